"""Which image stands at which position of the endless stream of training examples."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigsimclr.randomness import Stream, permuted, philox

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Repeat a set of images for ever, each epoch in another random order.

    A position is the number of examples seen before it, over all ranks. Batches run across the
    end of an epoch, as in the official code, which repeats before it cuts batches.

    Source: google-research/simclr data.py build_input_fn (shuffle, repeat, batch).
    """

    indices: Integers  # [M] the images of the set, by their index in the source
    seed: int

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the epoch and the image index at each position, both int64 [B]."""
        epochs, ranks = np.divmod(positions, len(self.indices))
        return epochs, self.indices[permuted(self.seed, epochs, ranks, len(self.indices))]

    def substitute(self, *, epoch: int, index: int, attempt: int) -> int:
        """Choose the image shown in place of image `index`, which cannot be read.

        The choice depends on nothing but its arguments, so every rank, worker and restart agrees.
        """
        counter = np.array([[epoch, index, attempt, 0]], np.uint32)
        high, low = philox(self.seed, Stream.SUBSTITUTE, counter)[0, :2].tolist()
        return int(self.indices[((high << 32) | low) % len(self.indices)])


@dataclass(frozen=True)
class Cut:
    """Cut the stream into steps, the steps into ranks, a rank's share into chunks."""

    first_example: int  # position of the first step
    step_examples: int  # images per step over all ranks
    low: int  # this rank's share of every step is [low, high)
    high: int
    chunk: int  # most images per chunk
    end: int | None = None  # positions stop here; None: the stream is endless

    @property
    def chunks_per_step(self) -> int:
        """Number of chunks of one step."""
        return max(1, math.ceil((self.high - self.low) / self.chunk))

    def step(self, number: int) -> Integers:
        """Return this rank's positions of one step."""
        start = self.first_example + number * self.step_examples
        return self._clipped(start + self.low, start + self.high)

    def piece(self, number: int) -> Integers:
        """Return the positions of one chunk, counted from the first step's first chunk."""
        step, piece = divmod(number, self.chunks_per_step)
        start = self.first_example + step * self.step_examples
        low = start + self.low + piece * self.chunk
        return self._clipped(low, min(low + self.chunk, start + self.high))

    def _clipped(self, low: int, high: int) -> Integers:
        return np.arange(low, high if self.end is None else min(high, self.end), dtype=np.int64)
