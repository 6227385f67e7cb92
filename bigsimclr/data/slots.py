"""Memory for pixels that is used again: a new page costs more time than filling it."""

import math
import mmap
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]

_SPARE = 3  # places of steps that are used: two by whoever reads, one that is handed over
_KEPT = 3  # one that is read, one that waits for a device, one that is filled


class Slots:
    """Places for the pixels of steps, shared with worker processes that this one forks later.

    Workers write a step where it is then read: nothing is copied, as long as whoever reads keeps no
    more than a step or two. A place is written again when nothing refers to it any more. The memory
    has no file: the size of /dev/shm, which containers keep small, does not limit it.

    Args:
        under_way: steps that may be open at once.
        shape: of the float32 pixels of a step.
    """

    def __init__(self, under_way: int, shape: tuple[int, ...]) -> None:
        size = 4 * math.prod(shape)
        self._places = [
            np.frombuffer(mmap.mmap(-1, size), np.float32) for _ in range(under_way + _SPARE)
        ]
        # By step modulo their number. Workers look it up when they write.
        self._chosen = np.frombuffer(mmap.mmap(-1, 8 * under_way), np.int64)
        self._open: set[int] = set()
        self._shape = shape

    def open(self, step: int) -> None:
        """Choose the place of a step, before it is given to anybody to write."""
        place = self._free()[0]
        self._chosen[step % len(self._chosen)] = place
        self._open.add(place)

    def of(self, step: int) -> Tensor:
        """Return the place of an open step."""
        return torch.from_numpy(self._places[self._at(step)]).view(self._shape)

    def close(self, step: int) -> Tensor:
        """Return the pixels of a step that is written; they are the caller's from now on."""
        pixels = self.of(step)
        self._open.discard(self._at(step))
        # The next step to be opened needs a place.
        return pixels if self._free() else pixels.clone()

    def _at(self, step: int) -> int:
        return int(self._chosen[step % len(self._chosen)])

    def _free(self) -> list[int]:
        # Every tensor that looks at a place holds a reference to it; the others are the list's and
        # the argument's.
        return [
            place
            for place in range(len(self._places))
            if place not in self._open and sys.getrefcount(self._places[place]) == 2
        ]


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
