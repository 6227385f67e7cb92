"""Which image stands at which position of the endless stream of training examples."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol, assert_never, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bigsimclr.randomness import Stream, permuted, philox

Integers = NDArray[np.int64]

_SLOTS: Final = 1000  # positions of one block of a mixture


@dataclass(frozen=True)
class Runs:
    """Images lie in shards, of which a few are read at a time."""

    shards: Integers  # [N] number of the shard, by the image's index in the source
    window: int  # shards read at a time


@dataclass(frozen=True)
class Part:
    """One source of several, behind each other: images [start, stop) of the whole."""

    start: int
    stop: int
    share: float  # of the examples seen, in proportion to the other parts' shares
    arrangement: "Arrangement | None"  # of the images of this part, counted from its start


@dataclass(frozen=True)
class Mixture:
    """Several sources that are seen in given shares."""

    parts: tuple[Part, ...]


Arrangement = Runs | Mixture


@runtime_checkable
class Arranged(Protocol):
    """A source that has a say in the order of its images."""

    arrangement: Arrangement | None  # None: any order will do


class AnyOrder(Protocol):
    """Which image stands at which position; a pure function of (seed, position)."""

    @property
    def seed(self) -> int:
        """The run's seed, which keys what is drawn for the images too."""
        ...

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the epoch and the image index at each position, both int64 [B].

        An image comes with the same epoch once only, so that it is drawn anew every time.
        """
        ...

    def substitute(self, *, epoch: int, index: int, attempt: int) -> int:
        """Choose the image shown in place of image `index`, which cannot be read."""
        ...


def order_of(indices: Integers, seed: int, arrangement: Arrangement | None) -> AnyOrder:
    """Return the order in which training sees a set of images.

    Args:
        indices: int64 [M], the images of the set, by their index in the source.
        seed: the run's seed.
        arrangement: what the source says of the order.
    """
    match arrangement:
        case None:
            return Order(indices, seed)
        case Runs():
            return RunsOrder(indices, seed, arrangement)
        case Mixture():
            return MixedOrder(indices, seed, arrangement)
        case _:
            assert_never(arrangement)


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
        return _substitute(self, epoch, index, attempt)


@dataclass(frozen=True)
class RunsOrder:
    """Read the shards in random order, a window of them at a time, for disks that dislike seeking.

    In each epoch the shards are permuted, cut into windows of a few shards, and the images of a
    window shuffled. An epoch shows every image once; images of shards that are far from each other
    in it never meet in a batch.
    """

    indices: Integers  # [M] the images of the set, by their index in the source
    seed: int
    runs: Runs

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the epoch and the image index at each position, both int64 [B]."""
        epochs, ranks = np.divmod(positions, len(self.indices))
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._in_epoch(epoch, ranks[here])
        return epochs, found

    def substitute(self, *, epoch: int, index: int, attempt: int) -> int:
        """Choose the image shown in place of image `index`, as `Order` does."""
        return _substitute(self, epoch, index, attempt)

    def _in_epoch(self, epoch: int, ranks: Integers) -> Integers:
        by_shard, starts = self._by_shard
        shards = len(starts) - 1
        order = permuted(
            self.seed, epoch, np.arange(shards, dtype=np.int64), shards, stream=Stream.SHARDS
        )
        ends = np.concatenate([[0], np.cumsum(np.diff(starts)[order])])
        borders = ends[
            np.minimum(np.arange(0, shards + self.runs.window, self.runs.window), shards)
        ]
        windows = np.searchsorted(borders, ranks, side="right") - 1
        shuffled = np.empty_like(ranks)
        for window in np.unique(windows).tolist():
            here = windows == window
            low, high = borders[window : window + 2].tolist()
            shuffled[here] = low + permuted(
                self.seed,
                epoch * (len(borders) - 1) + window,
                ranks[here] - low,
                high - low,
                stream=Stream.WINDOWS,
            )
        place = np.searchsorted(ends, shuffled, side="right") - 1
        found: Integers = by_shard[starts[order[place]] + shuffled - ends[place]]
        return found

    @cached_property
    def _by_shard(self) -> tuple[Integers, Integers]:
        """Return the images sorted by shard, and where each shard begins; shards have images."""
        shards = self.runs.shards[self.indices]
        by_shard = self.indices[np.argsort(shards, kind="stable")]
        _, counts = np.unique(shards, return_counts=True)
        return by_shard, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


@dataclass(frozen=True)
class MixedOrder:
    """Show several sources in given shares; each is walked through in its own order, for ever.

    Positions are cut into blocks of 1,000, in which every source has the same number of places:
    its share, rounded. Where in a block those are is random. An image's epoch is the number of
    times its source was walked through before.
    """

    indices: Integers  # [M] the images of the set, by their index in the source
    seed: int
    mixture: Mixture

    def at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the epoch and the image index at each position, both int64 [B]."""
        blocks, ranks = np.divmod(positions, _SLOTS)
        slots = permuted(self.seed, blocks, ranks, _SLOTS, stream=Stream.MIXTURE)
        epochs, found = np.empty_like(positions), np.empty_like(positions)
        first = 0
        for part, order, count in self._parts:
            here = (slots >= first) & (slots < first + count)
            places = blocks[here] * count + slots[here] - first
            epochs[here], within = order.at(places)
            found[here] = within + part.start
            first += count
        return epochs, found

    def substitute(self, *, epoch: int, index: int, attempt: int) -> int:
        """Choose the image shown in place of image `index`, as `Order` does."""
        return _substitute(self, epoch, index, attempt)

    @cached_property
    def _parts(self) -> list[tuple[Part, AnyOrder, int]]:
        """Return the parts that have images in the set, their orders and their places in a block.

        The largest remainders are rounded up; every part has a place.
        """
        found: list[tuple[Part, AnyOrder]] = []
        for number, part in enumerate(self.mixture.parts):
            own = self.indices[(self.indices >= part.start) & (self.indices < part.stop)]
            if len(own):
                # Of one seed, two sources of equal size would be walked through alike.
                words = philox(self.seed, Stream.PARTS, np.array([[number, 0, 0, 0]], np.uint32))
                low, high = words[0, :2].tolist()
                order = order_of(own - part.start, low | (high << 32), part.arrangement)
                found.append((part, order))
        shares = np.array([part.share for part, _ in found])
        wanted = shares / shares.sum() * _SLOTS
        counts = np.maximum(np.floor(wanted).astype(np.int64), 1)
        while counts.sum() < _SLOTS:
            counts[np.argmax(wanted - counts)] += 1
        while counts.sum() > _SLOTS:
            counts[np.argmin(np.where(counts > 1, wanted - counts, np.inf))] -= 1
        return [
            (part, order, count)
            for (part, order), count in zip(found, counts.tolist(), strict=True)
        ]


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


def _substitute(order: Order | RunsOrder | MixedOrder, epoch: int, index: int, attempt: int) -> int:
    counter = np.array([[epoch, index, attempt, 0]], np.uint32)
    high, low = philox(order.seed, Stream.SUBSTITUTE, counter)[0, :2].tolist()
    return int(order.indices[((high << 32) | low) % len(order.indices)])
