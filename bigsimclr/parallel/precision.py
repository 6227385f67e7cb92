"""What every strategy does alike: autocast, the fp16 loss scale, and the finite check."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

import torch
from torch import Tensor, nn

from bigsimclr.errors import NumericsError
from bigsimclr.models.layers import WorkingWeights
from bigsimclr.parallel import Update

AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}

# The loss scale's search, with the constants of torch.amp.GradScaler.
_FIRST_SCALE: Final = 65536.0
_GROWTH: Final = 2.0
_BACKOFF: Final = 0.5
_GROWTH_INTERVAL: Final = 2000


class _Arriving:
    """A number on its way from the GPU to the host."""

    def __init__(self, number: Tensor) -> None:
        self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
        self._number.copy_(number, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def value(self) -> Tensor:
        """Wait until it is there, which it is when another update has been queued."""
        self._event.synchronize()
        return self._number


class Precision:
    """The arithmetic of forward passes, and the verdict on gradients.

    The verdict follows from the norm over all parameters and all ranks, so that every rank comes to
    the same one, and the loss scale is the same everywhere.
    """

    def __init__(self, device: torch.device, precision: Literal["fp32", "bf16", "fp16"]) -> None:
        self.device = device
        self._autocast = AUTOCAST.get(precision)
        self._is_scaled = precision == "fp16"
        self._scale = _FIRST_SCALE if self._is_scaled else 1.0
        self._finite_updates = 0  # since the scale was last changed
        self._earlier: _Arriving | None = None

    def working_weights(self, model: nn.Module) -> WorkingWeights | None:
        """Give a model on its device the copies that 16-bit arithmetic works with."""
        return None if self._autocast is None else WorkingWeights(model, self._autocast)

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Run forward passes in the recipe's precision."""
        with torch.autocast(
            self.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            yield

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the fp16 loss scale, for the backward pass."""
        return loss * self._scale if self._is_scaled else loss

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the loss scale, in place."""
        if self._is_scaled and gradients:
            torch._foreach_mul_(list(gradients), 1.0 / self._scale)

    def judge(self, norm: Tensor) -> Update:
        """Say whether to step, by the norm [] of all gradients after `unscale`.

        On a GPU the host does not wait for the verdict on an update, unless its loss is scaled: it
        comes with the next one. What it concerns never reaches a checkpoint, which refuses tensors
        that are not finite.

        Raises:
            NumericsError: a gradient is not finite and no fp16 loss scale explains it.
        """
        if not self._is_scaled:
            self._refuse_non_finite(norm)
            return Update(gradient_norm=norm, skipped=False)
        skipped = not math.isfinite(norm.item())
        if skipped:
            self._scale, self._finite_updates = self._scale * _BACKOFF, 0
            if self._scale < 1.0:
                raise NumericsError("fp16 gradients overflow at any loss scale")
        else:
            self._finite_updates += 1
            if self._finite_updates == _GROWTH_INTERVAL:
                self._scale, self._finite_updates = self._scale * _GROWTH, 0
        return Update(gradient_norm=norm, skipped=skipped)

    def _refuse_non_finite(self, norm: Tensor) -> None:
        judged = norm
        if self.device.type == "cuda":
            arrived, self._earlier = self._earlier, _Arriving(norm)
            if arrived is None:
                return
            judged = arrived.value()
        if not math.isfinite(judged.item()):
            raise NumericsError(f"the gradient norm is {judged.item()}")

    def state(self) -> dict[str, float]:
        """Return the loss scale and its growth counter; empty without fp16."""
        if not self._is_scaled:
            return {}
        return {"scale": self._scale, "finite_updates": float(self._finite_updates)}

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale, or every restart would replay its search."""
        if self._is_scaled and state:
            self._scale, self._finite_updates = state["scale"], int(state["finite_updates"])
