"""The micro-batch that fits: which sizes are tried, and that ranks agree on one."""

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bigsimclr.engine.probe import find_memory, find_micro_batch
from bigsimclr.errors import RecipeError
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks

ENDS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("in other words"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


class Memory:
    """Room for so many images, and none more."""

    def __init__(self, room: int, end: RuntimeError | None = None) -> None:
        self.room = room
        self.end = torch.OutOfMemoryError("CUDA out of memory.") if end is None else end
        self.tried: list[int] = []

    def __call__(self, images: int) -> None:
        self.tried.append(images)
        if images > self.room:
            raise self.end


@pytest.mark.parametrize(
    ("rank_batch", "room", "tried"),
    [
        (48, 100, [48]),
        (48, 48, [48]),
        (48, 47, [48, 24]),
        (48, 13, [48, 24, 16, 12]),
        (48, 2, [48, 24, 16, 12, 8, 6, 4, 3, 2]),
        (7, 7, [7]),
        (1, 1, [1]),
    ],
)
def test_the_largest_divisor_that_fits(rank_batch: int, room: int, tried: list[int]) -> None:
    memory = Memory(room)
    assert find_micro_batch(memory, rank_batch, ALONE) == tried[-1]
    assert memory.tried == tried


@pytest.mark.parametrize("end", ENDS)
def test_every_way_in_which_memory_ends(end: RuntimeError) -> None:
    assert find_micro_batch(Memory(4, end), 8, ALONE) == 4


def test_the_host_says_that_its_memory_ends() -> None:
    def try_one(images: int) -> None:
        torch.empty((1 << 60) if images > 2 else 1, dtype=torch.uint8)

    assert find_micro_batch(try_one, 4, ALONE) == 2


def test_other_errors_are_not_taken_for_it() -> None:
    memory = Memory(4, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_micro_batch(memory, 8, ALONE)
    assert memory.tried == [8]


@pytest.mark.parametrize(("rank_batch", "fewest"), [(12, 2), (9, 3), (7, 7), (1, 1)])
def test_nothing_fits(rank_batch: int, fewest: int) -> None:
    # A single image is tried only where it is the whole share: batch norm needs two.
    memory = Memory(0)
    said = (
        rf"^batch\.micro_batch: of {rank_batch} images per rank not even {fewest} fit at once; "
        r"parallel\.memory=block, "
    )
    with pytest.raises(RecipeError, match=said):
        find_micro_batch(memory, rank_batch, ALONE)
    assert memory.tried[-1] == fewest


def test_a_failed_try_leaves_nothing_behind() -> None:
    left: list[weakref.ref[Tensor]] = []

    def try_one(images: int) -> None:
        assert all(reference() is None for reference in left)
        activations = nn.Linear(4, 4)(torch.ones(images, 4))
        left.append(weakref.ref(activations))
        cycle = [activations]
        cycle.append(cycle)  # type: ignore[arg-type]
        if images > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert find_micro_batch(try_one, 8, ALONE) == 2
    assert len(left) == 3


# --- several ranks -------------------------------------------------------------------------------


def found_on(world: World, *, rooms: list[int], rank_batch: int) -> tuple[int | str, list[int]]:
    memory = Memory(rooms[world.rank])
    try:
        return find_micro_batch(memory, rank_batch, world), memory.tried
    except RecipeError as error:
        return str(error), memory.tried


@pytest.mark.parametrize(
    ("rooms", "tried"),
    [([16, 16], [16]), ([16, 5], [16, 8, 4]), ([3, 8, 64], [16, 8, 4, 2])],
)
def test_ranks_agree_on_what_fits_everywhere(rooms: list[int], tried: list[int]) -> None:
    answers = on_ranks(len(rooms), partial(found_on, rooms=rooms, rank_batch=16))
    assert answers == [(tried[-1], tried)] * len(rooms)


def test_all_ranks_refuse_where_one_has_no_room() -> None:
    answers = on_ranks(2, partial(found_on, rooms=[8, 1], rank_batch=8))
    assert [tried for _, tried in answers] == [[8, 4, 2]] * 2
    for said, _ in answers:
        assert isinstance(said, str)
        assert "of 8 images per rank not even 2 fit at once" in said


NEEDED = {"none": 100, "selective": 40, "block": 10}


@pytest.mark.parametrize(
    ("room", "found", "tried"),
    [
        (100, "none", ["none"]),
        (99, "selective", ["none", "selective"]),
        (39, "block", ["none", "selective"]),
        (1, "block", ["none", "selective"]),
    ],
)
def test_the_first_way_to_save_memory_that_fits(room: int, found: str, tried: list[str]) -> None:
    memory, ways = Memory(room), []

    def attempt(way: str) -> None:
        ways.append(way)
        memory(NEEDED[way])

    assert find_memory(attempt, ALONE) == found
    assert ways == tried


def way_on(world: World) -> str:
    memory = Memory(room=50 if world.rank == 1 else 500)
    return find_memory(lambda way: memory(NEEDED[way]), world)


def test_ranks_save_memory_alike() -> None:
    assert on_ranks(3, way_on) == ["selective"] * 3
