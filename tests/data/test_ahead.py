"""A thread that prepares one item ahead: nothing lost, nothing doubled, nothing left running."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.data.ahead import one_ahead
from bigsimclr.data.slots import Recycled, Slots
from bigsimclr.data.steps import Means
from bigsimclr.errors import DataError
from tests.data.test_loader import Single, loader


def test_items_come_in_order_and_the_first_from_the_caller_s_thread() -> None:
    threads = []

    def items() -> Iterator[int]:
        for number in range(50):
            threads.append(threading.current_thread())
            yield number

    assert list(one_ahead(items())) == list(range(50))
    assert threads[0] is threading.current_thread()
    assert len(set(threads[1:])) == 1
    assert threads[1] is not threads[0]
    assert not threads[1].is_alive()
    assert list(one_ahead(number for number in range(0))) == []


def test_no_more_than_two_items_are_ahead() -> None:
    taken = 0
    most = 0

    def items() -> Iterator[int]:
        nonlocal most
        for number in range(200):
            most = max(most, number - taken)
            yield number

    for _ in one_ahead(items()):
        taken += 1
    assert taken == 200
    # Of those not taken yet one waits, one is handed over, and one is begun.
    assert most <= 3


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("no more")

    found = one_ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(DataError, match="no more"):
        next(found)


def test_closing_ends_the_thread_and_the_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    found = one_ahead(items())
    next(found)
    next(found)
    found.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_the_loader_s_stream_is_the_same_ahead(pictures: NDArray[np.uint8]) -> None:
    straight = list(loader(Single(pictures), workers=2).batches(0, 6))
    ahead = list(one_ahead(loader(Single(pictures), workers=2).batches(0, 6)))
    assert all(
        torch.equal(one.pixels, other.pixels) for one, other in zip(straight, ahead, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_same_pixels(pictures: NDArray[np.uint8], workers: int) -> None:
    here = list(loader(Single(pictures)).batches(0, 6))
    there = loader(Single(pictures), means=Means(workers=workers, device=torch.device("cuda")))
    for expected, found in zip(here, there.batches(0, 6), strict=True):
        assert found.pixels.is_cuda
        assert torch.equal(found.pixels.cpu(), expected.pixels)


def test_recycled_memory_is_never_taken_from_a_reader() -> None:
    memory = Recycled()
    first = memory.take((2, 3))
    place = first.data_ptr()
    assert memory.take((2, 3)).data_ptr() != place
    row = first[1]
    del first
    assert memory.take((2, 3)).data_ptr() != place
    del row
    assert memory.take((3, 2)).data_ptr() == place
    kept = [memory.take((4,)) for _ in range(10)]
    assert len({tensor.data_ptr() for tensor in kept}) == 10


def written(slots: Slots, step: int) -> Tensor:
    """Open a step, write it and close it."""
    slots.open(step)
    slots.of(step).fill_(step)
    return slots.close(step)


def test_slots_are_handed_on_and_used_again() -> None:
    slots = Slots(1, (2, 2))
    places = set()
    for step in range(50):
        places.add(written(slots, step).data_ptr())
    assert len(places) == 1
    # Whoever reads may hold one while the next is written, and one more.
    held = written(slots, 50)
    kept = {held.data_ptr()}
    for step in range(51, 60):
        held = written(slots, step)
        kept.add(held.data_ptr())
    assert len(kept) == 2


def test_a_slot_is_never_taken_from_a_reader() -> None:
    slots = Slots(2, (2, 3))
    slots.open(0)
    kept = []
    for step in range(40):
        slots.open(step + 1)
        slots.of(step + 1).fill_(step + 1)
        if step:
            # A part of a step keeps all of it.
            kept.append((step, slots.close(step)[1]))
        else:
            slots.close(step)
    assert all((row == step).all() for step, row in kept)
    assert len({row.data_ptr() for _, row in kept}) == 39


def test_no_step_is_copied_while_two_are_held() -> None:
    slots = Slots(2, (4,))
    slots.open(0)
    before: list[Tensor] = []
    for step in range(30):
        slots.open(step + 1)
        place = slots.of(step).data_ptr()
        pixels = slots.close(step)
        assert pixels.data_ptr() == place
        before = [*before[-1:], pixels]
        del pixels
