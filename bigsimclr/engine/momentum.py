"""An averaged copy of a model, and a queue of past projections as further negatives.

Source: arXiv 2006.10029 section 2 (memory from MoCo, arXiv 1911.05722): 64k negatives, decay 0.999.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigsimclr.errors import CheckpointError
from bigsimclr.optim.tensors import copy_tensors, tensors_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class AveragedCopy(Generic[ModuleT]):
    """A copy of a model whose weights and batch norm statistics trail behind as averages.

    After every update, copy = ema_decay * copy + (1 - ema_decay) * model. The copy takes no
    gradient and starts equal to the model.

    Args:
        model: The model that is trained.
        ema_decay: Share of the copy that is kept at each update, between 0 and 1.
    """

    def __init__(self, model: ModuleT, ema_decay: float) -> None:
        if not 0.0 < ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1, not {ema_decay}")
        self.ema_decay = ema_decay
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, pieces: Iterable[Mapping[str, Tensor]]) -> None:
        """Move the copy towards the model; call it once after each optimizer update.

        Args:
            pieces: the model's parameters and buffers by name, some at a time: where ranks share
                them, they are whole only one after the other.
        """
        own = self.state()
        for current in pieces:
            averaged = [name for name in current if own[name].is_floating_point()]
            torch._foreach_lerp_(
                [own[name] for name in averaged],
                [current[name] for name in averaged],
                1.0 - self.ema_decay,
            )
            for name in current.keys() - set(averaged):
                own[name].copy_(current[name])

    def state(self) -> dict[str, Tensor]:
        """Return the copy's own tensors by the model's names."""
        return tensors_of(self.model)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into the copy.

        Raises:
            CheckpointError: If names, shapes or types differ from the copy's.
        """
        copy_tensors(self.state(), tensors, what="averaged copy")


class Queue:
    """The newest projections, in a ring: new rows replace the oldest ones.

    Rows are stored divided by their length, as the loss compares them. Over several ranks every
    rank pushes the gathered rows in the order of the global batch, so all hold the same queue.

    Args:
        length: Rows kept at most.
        width: Width of a projection.
        device: Where the rows live.
        dtype: Their number format.
    """

    def __init__(
        self,
        length: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if length < 1 or width < 1:
            raise ValueError(f"length {length} and width {width} must be positive")
        self._rows = torch.zeros(length, width, device=device, dtype=dtype)
        self._next = 0  # row that the next push writes first
        self._count = 0  # rows that hold a projection

    @property
    def filled(self) -> Tensor:
        """The stored rows [n, width], n at most `length`; a view, in the order of the ring."""
        return self._rows[: self._count]

    @torch.no_grad()
    def push(
        self,
        rows: Tensor,  # [n, width] projections, of any length
    ) -> None:
        """Store rows, the last one as the newest; of more than `length` rows the last ones stay.

        Raises:
            ValueError: If the width is another.
        """
        length, width = self._rows.shape
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"rows must be [n, {width}], not {tuple(rows.shape)}")
        newest = F.normalize(rows.detach().to(self._rows.dtype)[-length:], dim=1, eps=1e-6)
        until_end = min(len(newest), length - self._next)
        self._rows[self._next : self._next + until_end] = newest[:until_end]
        self._rows[: len(newest) - until_end] = newest[until_end:]
        self._next = (self._next + len(newest)) % length
        self._count = min(self._count + len(newest), length)

    def state(self) -> dict[str, Tensor]:
        """Return the ring [length, width], the place of the next row and the number of rows."""
        return {
            "rows": self._rows,
            "next": torch.tensor(self._next),
            "count": torch.tensor(self._count),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the ring exactly, so that later losses are the same to the last bit.

        Raises:
            CheckpointError: If names or shapes differ, or the place is outside of the ring.
        """
        own = self.state()
        copy_tensors(own, tensors, what="queue")
        position, count = int(own["next"]), int(own["count"])
        length = len(self._rows)
        if not (0 <= position < length and 0 <= count <= length):
            raise CheckpointError(f"queue of {length} rows cannot be at {position} with {count}")
        self._next, self._count = position, count
