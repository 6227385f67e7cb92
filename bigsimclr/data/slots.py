"""Pixels handed over in memory that a process shares with the worker processes it forks."""

import math
import mmap

import torch
from torch import Tensor


class Slots:
    """A ring of equal places: piece `number` of a stream is written to place `number` modulo many.

    Made once and used again and again, so that memory is bounded and no page is new. The memory has
    no file, and the size of /dev/shm, which containers keep small, does not limit it.

    Args:
        count: places; one more than the pieces that may be under way or waiting.
        shape: of the float32 pixels in each place.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        floats = math.prod((count, *shape))
        self._places = torch.frombuffer(mmap.mmap(-1, 4 * floats), dtype=torch.float32).view(
            count, *shape
        )

    def of(self, number: int) -> Tensor:
        """Return the place of piece `number`."""
        return self._places[number % len(self._places)]
