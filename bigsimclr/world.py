"""Which process this is, the device it computes on, and how the processes speak to each other.

Every rank must make the same calls in the same order.

Shapes: W processes.
"""

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.distributed import (  # type: ignore[attr-defined] # public, though not declared so
    PrefixStore,
    Store,
    rendezvous,
)
from typing_extensions import override

from bigsimclr.errors import (
    BigSimCLRError,
    DistributedError,
    Elsewhere,
    RecipeError,
    error_of,
)

try:
    from torch.distributed import all_gather_single
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD: Final = -1  # glibc's malloc.h
_MMAP_THRESHOLD: Final = -3


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int  # number of this process, from 0
    size: int  # number of processes, W
    device: torch.device
    group: dist.ProcessGroup | None = None  # of a part of the processes; None: all of them
    store: Store | None = None  # small facts that a process tells outside of collectives

    def __deepcopy__(self, memo: dict[int, object]) -> "World":
        # Copies of a module speak to the same processes.
        return self

    def gather(
        self,
        tensor: Tensor,  # [...], of the same shape and type on every rank
    ) -> Tensor:  # [W, ...]
        """Collect every rank's tensor, in the order of the ranks; no gradient flows."""
        own = tensor.detach().contiguous()
        if self.size == 1:
            return own[None]
        everyone = own.new_empty(self.size, *own.shape)
        all_gather_single(everyone.view(-1), own.view(-1), group=self.group)
        return everyone

    def gather_rows(
        self,
        rows: Tensor,  # [n, ...], n the same on every rank
    ) -> Tensor:  # [W*n, ...]
        """Put all ranks' rows one behind the other, in the order of the ranks.

        A row's gradient is the sum over all ranks of what each made of it: that of the sum of
        their losses. Averaged over ranks like all gradients, it becomes that of the mean loss.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def gather_views(
        self,
        rows: Tensor,  # [2n, ...] of this rank's first views, then of its second ones
    ) -> Tensor:  # [2nW, ...] of all first views, then of all second ones
        """Collect what ranks have of their views in the order of the batch, without gradient."""
        if self.size == 1:
            return rows
        by_view: Tensor = self.gather(rows).unflatten(1, (2, -1)).transpose(0, 1)
        return by_view.flatten(0, 2)

    def total(
        self,
        tensor: Tensor,  # [...]
    ) -> Tensor:  # [...]
        """Add every rank's tensor in the order of the ranks: the same bits on all of them."""
        return self.gather(tensor).sum(0)

    def start_sum(
        self,
        tensor: Tensor,  # [...], overwritten
    ) -> "Sum":
        """Begin to add every rank's tensor, while this rank goes on."""
        return Sum(
            tensor,
            dist.all_reduce(tensor, group=self.group, async_op=True) if self.size > 1 else None,
        )

    @torch.no_grad()
    def copy_from(
        self,
        rank: int,
        tensor: Tensor,  # [...], overwritten on all ranks but this one
    ) -> None:
        """Give every rank what one of them has."""
        if self.size > 1:
            own = tensor.contiguous()
            dist.broadcast(own, group_src=rank, group=self.group)
            tensor.copy_(own)

    def numbers(self, own: int) -> list[int]:
        """Collect a whole number of every rank, through the host: no device is waited for."""
        found: list[int] = self.gather(torch.tensor(own)).tolist()
        return found

    def texts(self, own: str) -> list[str]:
        """Collect a text of every rank, through the host."""
        content = own.encode()
        lengths = self.numbers(len(content))
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        rows = self.gather(padded)
        return [
            bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run what may fail on some ranks only, without collectives; then all of them fail.

        Raises:
            BigSimCLRError: on the first rank, what the lowest failing rank met.
            Elsewhere: on all others.
        """
        if self.size == 1:
            yield
            return
        met: BigSimCLRError | None = None
        try:
            yield
        except BigSimCLRError as error:
            met = error
        codes = self.numbers(0 if met is None else met.exit_code)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None:
            return
        message = self.texts("" if met is None else str(met))[failed]
        if self.rank:
            raise Elsewhere(codes[failed]) from met
        if met is not None:
            raise met
        raise error_of(codes[failed], f"rank {failed}: {message}")

    @staticmethod
    def is_loss(error: RuntimeError) -> bool:
        """Say whether a collective failed because another rank is gone."""
        return isinstance(error, dist.DistError) or any(
            word in str(error) for word in ("onnection closed by peer", "onnection reset", "Gloo")
        )

    def check_same(self, what: str, own: str) -> None:
        """Refuse to go on where ranks differ.

        Args:
            what: names the fact in the error.
            own: this rank's.

        Raises:
            DistributedError: on the first rank; it names the first that differs from it.
            Elsewhere: on all others.
        """
        texts = self.texts(own)
        differs = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
        if differs is None:
            return
        if self.rank:
            raise Elsewhere(DistributedError.exit_code)
        raise DistributedError(
            f"ranks disagree on the {what}: rank 0 has {texts[0]}, rank {differs} has "
            f"{texts[differs]}; start all of them from the same files and versions"
        )

    def neighbours(self, size: int | None) -> "World":
        """Return the group of `size` consecutive ranks that this one belongs to; None: all ranks.

        Every rank must call it; the world's size is a multiple of `size`.
        """
        if size is None or size == self.size:
            return self
        if size == 1:
            return replace(ALONE, device=self.device)
        own: dist.ProcessGroup | None = None
        for first in range(0, self.size, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= self.rank < first + size:
                own = group
        return World(self.rank % size, size, self.device, own, self.store)


@dataclass(frozen=True)
class Sum:
    """A sum over the ranks that is on its way."""

    _tensor: Tensor
    _work: dist.Work | None

    def wait(self) -> Tensor:
        """Return the sum, when it is there."""
        if self._work is not None:
            self._work.wait()
        return self._tensor


ALONE: Final = World(rank=0, size=1, device=torch.device("cpu"))
"""One process, for functions that can do without others; its device is not looked at."""


class _GatherRows(Function):
    """Collect rows; backward, collect the gradients and add those of this rank's rows."""

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, rows: Tensor, world: World) -> Tensor:
        ctx.world = world  # type: ignore[attr-defined] # a context takes any attribute
        return world.gather(rows).flatten(0, 1)

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        world: World = ctx.world  # type: ignore[attr-defined]
        everyone = gradient.contiguous().clone()
        dist.all_reduce(everyone, group=world.group)
        return everyone.unflatten(0, (world.size, -1))[world.rank], None


def own_rank() -> int:
    """Return this process's number among all of the run, before they speak to each other."""
    return int(os.environ.get("RANK", "0"))  # noqa: TID251 - allowed here


@dataclass(frozen=True)
class Job:
    """The Slurm job that this process is part of."""

    number: str  # "123", or "12_3" for element 3 of the array 12
    restart: int  # times that Slurm has started the job again, under the same number


def own_job() -> Job | None:
    """Return the Slurm job of this process; None outside of Slurm."""
    number, array, element, restart = (
        os.environ.get(f"SLURM_{name}", "")  # noqa: TID251 - allowed here
        for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT")
    )
    number = f"{array}_{element}" if array and element else number  # as squeue shows it
    return Job(number, int(restart) if restart.isdecimal() else 0) if number else None


@contextmanager
def join_world(wait_seconds: float = 120.0) -> Iterator[World]:
    """Meet the other processes of the run, which were started as torchrun or Slurm starts them.

    Without the variables RANK and WORLD_SIZE, or with a WORLD_SIZE of 1, this process is alone.

    Args:
        wait_seconds: how long to wait for the others.

    Yields:
        The world, on the host; `use_device` gives it a device.

    Raises:
        DistributedError: some did not come; the message names them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))  # noqa: TID251 - allowed here
    if size == 1:
        yield ALONE
        return
    rank = own_rank()
    wait = timedelta(seconds=wait_seconds)
    try:
        store, _, _ = next(rendezvous("env://", rank=rank, world_size=size, timeout=wait))
    except (ValueError, dist.DistError) as error:
        raise DistributedError(f"rank {rank} finds no meeting point: {error}") from error
    _wait_for_all(store, rank, size, wait)
    # Host and device collectives in one group; the watchdog, not this timeout, ends a hang.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("ranks", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(days=1),
    )
    try:
        yield World(rank, size, torch.device("cpu"), store=store)
    finally:
        dist.destroy_process_group()


def _wait_for_all(store: Store, rank: int, size: int, wait: timedelta) -> None:
    keys = [f"here/{number}" for number in range(size)]
    store.set(keys[rank], "1")
    try:
        store.wait(keys, wait)
    except dist.DistStoreError as error:
        absent = [str(number) for number, key in enumerate(keys) if not store.check([key])]
        raise DistributedError(
            f"of {size} ranks, {', '.join(absent)} did not come within {wait.total_seconds():g} s; "
            "see what they printed"
        ) from error


def use_device(
    world: World,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    *,
    cpu_threads: int | None = None,
    deterministic: bool = False,
) -> World:
    """Choose this process's device, and set how it computes.

    Args:
        world: this process among the others.
        device: auto takes the GPU where there is one; the log says which was taken.
        cpu_threads: threads of CPU arithmetic; None leaves what the environment says.
        deterministic: refuse GPU kernels whose result changes from run to run.

    Raises:
        RecipeError: cuda is asked for and there is none, or fewer than ranks of this machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("parallel.device: cuda is not available here; use auto or cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    # The call imports the compiler, four seconds of it, so it is made only to change something.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if chosen == "cpu":
        logger.info("device: cpu")
        return replace(world, device=torch.device("cpu"))
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Without it cuBLAS refuses; it is read at the first matrix product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # noqa: TID251 - allowed here
    if world.size == 1:
        logger.info("device: cuda")
        return replace(world, device=torch.device("cuda"))
    number = int(os.environ.get("LOCAL_RANK", str(world.rank)))  # noqa: TID251 - allowed here
    if number >= torch.cuda.device_count():
        raise RecipeError(
            f"rank {world.rank}: this machine has {torch.cuda.device_count()} GPUs, one for each "
            "rank; start fewer ranks, or use parallel.device=cpu"
        )
    torch.cuda.set_device(number)
    logger.info("device: cuda:%d", number)
    return replace(world, device=torch.device("cuda", number))


def keep_freed_memory() -> None:
    """Let this process keep what it frees, unless the environment says how it is to allocate.

    For a process that does nothing but train on a CPU: it cannot be undone. With glibc only.

    A training step frees what the next one asks for again. What the system takes back in between
    it hands out anew page by page, cleared: 5% of the time of a ResNet-18 on 32 images of 32
    pixels. Now up to 2 GiB at the end of the heap stay with the process, and blocks of 32 MiB, the
    most that glibc comes to by itself, are on the heap from the start.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)  # noqa: TID251 - allowed here
    told |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")  # noqa: TID251
    if sys.platform != "linux" or told or torch.cuda.is_available():
        return
    options = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if options is not None:
        options(_MMAP_THRESHOLD, 32 << 20)
        options(_TRIM_THRESHOLD, 2**31 - 1)


def name_device(device: torch.device) -> None:
    """Say in the environment which device this rank took, for libraries that look there."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # noqa: TID251 - allowed here
