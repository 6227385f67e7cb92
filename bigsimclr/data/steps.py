"""The chunks of a stream put together: read in this process, by workers, or decoded by DALI."""

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bigsimclr.data.chunks import Chunk, ChunkReader, Reading
from bigsimclr.data.dali import DaliCrops, UndecodableError
from bigsimclr.data.decoders import Decoder
from bigsimclr.data.late import LateChunk, LateReader
from bigsimclr.data.order import Cut
from bigsimclr.data.slots import Recycled, Slots
from bigsimclr.data.workers import from_workers, under_way

# Small enough to keep all workers busy to the end of a step, large enough for few messages.
_CHUNK_IMAGES = 64
_CHUNK_BYTES = 8 << 20

_CPU = torch.device("cpu")
_IN_HAND = 2  # chunks that DALI has: one is decoded while the other is collected


@dataclass(frozen=True)
class Means:
    """What a stream is read with; none of it changes which images come or how they are cropped.

    Attributes:
        workers: Processes that read, decode and crop; 0: this process.
        prefetch_batches: Batches that the workers together prepare ahead.
        device: Where batches are wanted.
        decoder: Of plain JPEGs; DALI crops as well, both on the device.
    """

    workers: int = 0
    prefetch_batches: int = 2
    device: torch.device = _CPU
    decoder: Decoder = "pillow"


ALONE = Means()
"""Everything in this process, on the CPU."""


def chunk_images(reading: Reading, means: Means) -> int:
    """Choose how many images a chunk has."""
    view_bytes = 4 * 3 * reading.settings.image_size**2 * reading.views
    most = min(_CHUNK_IMAGES, max(1, _CHUNK_BYTES // view_bytes))
    return _CHUNK_IMAGES if means.decoder == "dali" else most


def read_steps(
    reading: Reading, cut: Cut, *, steps: int, means: Means
) -> Generator[tuple[list[Chunk], Tensor], None, None]:
    """Yield one step after the other: what is known of its chunks, and its pixels.

    The pixels are float32 [V, b, 3, H, W], b the images that were readable: on the device where
    DALI decodes, else on the host, and pinned where the device is a GPU.
    """
    chunks = steps * cut.chunks_per_step
    with closing(_filler(reading, cut, chunks, means)) as filler:
        rooms = _rooms(means)
        side = reading.settings.image_size
        for step in range(steps):
            pixels = rooms.take((reading.views, len(cut.step(step)), 3, side, side))
            read: list[Chunk] = []
            filled = 0
            for _ in range(cut.chunks_per_step):
                read.append(filler.fill(pixels[:, filled:]))
                filled += len(read[-1])
            yield read, pixels[:, :filled]


class _Filler(Protocol):
    """Chunks in order, written where they are wanted."""

    def fill(self, room: Tensor) -> Chunk:
        """Write the next chunk to the first images of `room` [V, n, 3, H, W]."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def _filler(reading: Reading, cut: Cut, chunks: int, means: Means) -> _Filler:
    ahead = means.prefetch_batches * cut.chunks_per_step
    if means.decoder == "dali":
        return _ByDali(reading, cut, chunks, ahead=ahead, means=means)
    if means.workers:
        return _ByWorkers(reading, cut, chunks, workers=means.workers, ahead=ahead)
    return _Here(reading, cut, chunks)


class _Rooms(Protocol):
    def take(self, shape: tuple[int, ...]) -> Tensor: ...


class _Fresh:
    """Memory that PyTorch uses again by itself, for pixels on a GPU or on their way to it."""

    def __init__(self, means: Means) -> None:
        self._means = means

    def take(self, shape: tuple[int, ...]) -> Tensor:
        if self._means.decoder == "dali":
            return torch.empty(shape, device=self._means.device)
        return torch.empty(shape, pin_memory=True)


def _rooms(means: Means) -> _Rooms:
    return _Fresh(means) if means.device.type == "cuda" else Recycled()


class _Here:
    """Reads chunks in this process."""

    def __init__(self, reading: Reading, cut: Cut, chunks: int) -> None:
        self._reader = ChunkReader(reading, cut, chunks, None)
        self._next = 0

    def fill(self, room: Tensor) -> Chunk:
        self._next += 1
        return self._reader.read(self._next - 1, room)

    def close(self) -> None:
        pass


class _ByWorkers:
    """Copies what worker processes have put into their slots."""

    def __init__(
        self, reading: Reading, cut: Cut, chunks: int, *, workers: int, ahead: int
    ) -> None:
        side = reading.settings.image_size
        # The chunk that is copied is the first of them: its place is given on after the copy.
        places = under_way(workers=workers, ahead=ahead)
        self._slots = Slots(places, (reading.views, cut.chunk, 3, side, side))
        reader = ChunkReader(reading, cut, chunks, self._slots)
        self._arriving = from_workers(reader, chunks, workers=workers, ahead=ahead)
        self._next = 0

    def fill(self, room: Tensor) -> Chunk:
        chunk = next(self._arriving)
        room[:, : len(chunk)].copy_(self._slots.of(self._next)[:, : len(chunk)])
        self._next += 1
        return chunk

    def close(self) -> None:
        self._arriving.close()


class _ByDali:
    """Lets DALI decode and crop the plain JPEGs that were read here or by workers."""

    def __init__(
        self, reading: Reading, cut: Cut, chunks: int, *, ahead: int, means: Means
    ) -> None:
        reader = LateReader(reading, cut, chunks)
        self._arriving = (
            from_workers(reader, chunks, workers=means.workers, ahead=ahead)
            if means.workers
            else (reader[number] for number in range(chunks))
        )
        self._judge = ChunkReader(reading, cut, chunks, None)
        self._next = 0
        self._started: deque[LateChunk] = deque()
        self._crops = DaliCrops(
            views=reading.views,
            side=reading.settings.image_size,
            most=cut.chunk,
            threads=max(1, means.workers),
            device=means.device,
        )

    def fill(self, room: Tensor) -> Chunk:
        while len(self._started) < _IN_HAND and (late := next(self._arriving, None)) is not None:
            if late.jpegs:
                self._crops.start(late.jpegs, late.boxes)
            self._started.append(late)
        late = self._started.popleft()
        number, self._next = self._next, self._next + 1
        try:
            if late.jpegs:
                room[:, late.jpeg_rows] = self._crops.finish()
        except UndecodableError:
            return self._judged(number, room)
        for row, views in zip(late.crop_rows, late.crops, strict=True):
            room[:, row] = torch.from_numpy(views).to(room.device)
        return late.chunk

    def _judged(self, number: int, room: Tensor) -> Chunk:
        """Read the whole chunk as if DALI were not there: it does not say which image it was."""
        here = room if room.device.type == "cpu" else torch.empty(room.shape)
        chunk = self._judge.read(number, here)
        if here is not room:
            room[:, : len(chunk)] = here[:, : len(chunk)].to(room.device)
        return chunk

    def close(self) -> None:
        self._arriving.close()
