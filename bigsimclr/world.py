"""Which process this is, and the device it computes on."""

import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch

from bigsimclr.errors import RecipeError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int  # number of this process, from 0
    size: int  # number of processes
    device: torch.device


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
