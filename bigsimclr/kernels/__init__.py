"""Fused functions for GPUs, written in Triton: the only door to it.

Each file holds one function with its gradient, and names the plain PyTorch code that computes the
same. Which of the two runs is decided once for a run, by `uses_triton`.
"""

import logging
from importlib.util import find_spec
from shutil import which
from typing import Final, Literal

import torch

from bigsimclr.errors import MissingExtraError

logger = logging.getLogger(__name__)

Choice = Literal["auto", "plain", "triton"]

_OLDEST: Final = (8, 0)
"""Compute capability from which on a GPU multiplies bfloat16."""
WIDEST_PROJECTION: Final = 512
"""Values of a projection that NT-Xent's kernels hold."""


def uses_triton(choice: Choice, device: torch.device) -> bool:
    """Say whether a run computes with the fused kernels, and log it.

    Args:
        choice: auto takes them on a GPU and plain PyTorch elsewhere; the others are orders.
        device: where the run computes.

    Raises:
        MissingExtraError: they are ordered by name and cannot run here.
    """
    if choice == "plain" or (choice == "auto" and device.type != "cuda"):
        logger.info("kernels: plain PyTorch")
        return False
    missing = _missing(device)
    if choice == "triton" and missing:
        raise MissingExtraError(
            f"parallel.kernels: triton cannot run here: {missing}; parallel.kernels=auto takes "
            "what can"
        )
    if missing:
        logger.warning("kernels: plain PyTorch, since %s", missing)
    else:
        logger.info("kernels: fused, in Triton")
    return not missing


def is_interpreted() -> bool:
    """Say whether Triton runs its interpreter (TRITON_INTERPRET=1), on a CPU and for tests.

    Its bf16 arithmetic is wrong without a word; that of float32 and float16 is a GPU's.
    """
    import triton

    return bool(triton.knobs.runtime.interpret)


def _missing(device: torch.device) -> str:
    """Say what the kernels lack on this device; nothing if they run."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if is_interpreted():
        return ""
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return "the GPU is older than compute capability 8.0"
    if not any(which(name) for name in ("cc", "gcc", "clang")):
        return "there is no C compiler, which Triton starts its kernels with"
    return ""
