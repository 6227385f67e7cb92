"""Which process this is, the device it computes on, and how the processes speak to each other.

Every rank must make the same calls in the same order.

Shapes: W processes.
"""

import logging
import os
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from typing_extensions import override

from bigsimclr.errors import RecipeError

try:
    from torch.distributed import all_gather_single
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int  # number of this process, from 0
    size: int  # number of processes, W
    device: torch.device

    def gather(
        self,
        tensor: Tensor,  # [...], of the same shape and type on every rank
    ) -> Tensor:  # [W, ...]
        """Collect every rank's tensor, in the order of the ranks; no gradient flows."""
        own = tensor.detach().contiguous()
        if self.size == 1:
            return own[None]
        everyone = own.new_empty(self.size, *own.shape)
        all_gather_single(everyone.view(-1), own.view(-1))
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
        return Sum(tensor, dist.all_reduce(tensor, async_op=True) if self.size > 1 else None)

    @torch.no_grad()
    def copy_from_first(
        self,
        tensor: Tensor,  # [...], overwritten on all ranks but the first
    ) -> None:
        """Give every rank what the first one has."""
        if self.size > 1:
            own = tensor.contiguous()
            dist.broadcast(own, src=0)
            tensor.copy_(own)


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
        dist.all_reduce(everyone)
        return everyone.unflatten(0, (world.size, -1))[world.rank], None


def join_world(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    *,
    cpu_threads: int | None = None,
    deterministic: bool = False,
) -> World:
    """Find this process's place and device, and set how the device computes.

    Args:
        device: auto takes the GPU where there is one; the log says which was taken.
        cpu_threads: threads of CPU arithmetic; None leaves one per core.
        deterministic: refuse GPU kernels whose result changes from run to run.

    Raises:
        RecipeError: cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("parallel.device: cuda is not available here; use auto or cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    # The call imports the compiler, four seconds of it, so it is made only to change something.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if chosen == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            # Without it cuBLAS refuses; it is read at the first matrix product.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # noqa: TID251 - allowed here
    logger.info("device: %s", chosen)
    return World(rank=0, size=1, device=torch.device(chosen))
