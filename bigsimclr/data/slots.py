"""Memory for pixels that is used again: a new page costs more time than filling it."""

import math
import mmap
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]

_KEPT = 3  # one that is read, one that waits for a device, one that is filled


class Slots:
    """A ring of equal places, shared with the worker processes that this one forks later.

    Piece `number` of a stream is written to place `number` modulo the places. The memory has no
    file: the size of /dev/shm, which containers keep small, does not limit it.

    Args:
        count: places; as many as the pieces that may be under way, waiting or used.
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


class Recycled:
    """Float32 tensors whose memory is used again when nothing refers to them any more."""

    def __init__(self) -> None:
        self._arrays: list[Floats] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of any content."""
        count = math.prod(shape)
        for array in self._arrays:
            # Every tensor that looks at the array holds one reference to it; the others are the
            # list's, the loop's and the argument's.
            if sys.getrefcount(array) == 3 and array.size == count:
                return torch.from_numpy(array).view(shape)
        # numpy asks for huge pages, which are new several times as fast.
        fresh = np.empty(count, np.float32)
        self._arrays = [*self._arrays[1 - _KEPT :], fresh]
        return torch.from_numpy(fresh).view(shape)
