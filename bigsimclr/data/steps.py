"""The chunks of a stream put together: read in this process, by workers, or decoded by DALI."""

import logging
import math
from collections import deque
from collections.abc import Callable, Generator
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

logger = logging.getLogger(__name__)

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
    with closing(_filler(reading, cut, steps, means)) as filler:
        rooms = _Rooms(reading, means)
        for step in range(steps):
            yield filler.fill(rooms, len(cut.step(step)))


class _Filler(Protocol):
    """Steps in order, their pixels where they are wanted."""

    def fill(self, rooms: "_Rooms", images: int) -> tuple[list[Chunk], Tensor]:
        """Return what is known of the next step, and pixels [V, b, 3, H, W] of b <= `images`."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def _filler(reading: Reading, cut: Cut, steps: int, means: Means) -> _Filler:
    ahead = means.prefetch_batches * cut.chunks_per_step
    if means.decoder == "dali":
        return _ByDali(reading, cut, steps, ahead=ahead, means=means)
    if means.workers:
        return _ByWorkers(reading, cut, steps, ahead=ahead, means=means)
    return _Here(reading, cut, steps)


def _filled(
    fill: Callable[[Tensor], Chunk], chunks: int, room: Tensor
) -> tuple[list[Chunk], Tensor]:
    """Put chunks one behind the other into a room, each as long as it turns out to be."""
    read: list[Chunk] = []
    filled = 0
    for _ in range(chunks):
        read.append(fill(room[:, filled:]))
        filled += len(read[-1])
    return read, room[:, :filled]


class _Rooms:
    """Memory for the pixels of a step."""

    def __init__(self, reading: Reading, means: Means) -> None:
        self._views, self._side = reading.views, reading.settings.image_size
        self._means = means
        self._recycled = Recycled()

    def take(self, images: int) -> Tensor:
        """Return float32 [V, images, 3, H, W] of any content."""
        shape = (self._views, images, 3, self._side, self._side)
        # PyTorch itself uses memory of a GPU, and pinned memory, again.
        if self._means.device.type != "cuda":
            return self._recycled.take(shape)
        if self._means.decoder == "dali":
            return torch.empty(shape, device=self._means.device)
        return torch.empty(shape, pin_memory=True)


class _Here:
    """Reads chunks in this process."""

    def __init__(self, reading: Reading, cut: Cut, steps: int) -> None:
        self._chunks = cut.chunks_per_step
        self._reader = ChunkReader(reading, cut, steps * self._chunks, None)
        self._next = 0

    def fill(self, rooms: _Rooms, images: int) -> tuple[list[Chunk], Tensor]:
        return _filled(self._chunk, self._chunks, rooms.take(images))

    def _chunk(self, room: Tensor) -> Chunk:
        self._next += 1
        return self._reader.read(self._next - 1, room)

    def close(self) -> None:
        pass


class _ByWorkers:
    """Hands on what worker processes have put into their slots."""

    def __init__(self, reading: Reading, cut: Cut, steps: int, *, ahead: int, means: Means) -> None:
        self._cut, self._steps = cut, steps
        self._is_pinned = means.device.type == "cuda"
        side, chunks = reading.settings.image_size, cut.chunks_per_step
        # While the last chunk of a step is awaited, those of so many steps have been given out.
        window = under_way(workers=means.workers, ahead=ahead)
        self._under_way = math.ceil(window / chunks) + 1
        room = (reading.views, cut.high - cut.low, 3, side, side)
        self._slots = Slots(self._under_way, room)
        reader = ChunkReader(reading, cut, steps * chunks, self._slots)
        self._arriving = from_workers(reader, steps * chunks, workers=means.workers, ahead=ahead)
        self._opened = self._next = 0

    def fill(self, rooms: _Rooms, images: int) -> tuple[list[Chunk], Tensor]:
        step, self._next = self._next, self._next + 1
        while self._opened < min(self._steps, step + self._under_way):
            self._slots.open(self._opened)
            self._opened += 1
        read = [next(self._arriving) for _ in range(self._cut.chunks_per_step)]
        pixels = self._slots.close(step)
        if not self._is_pinned and sum(map(len, read)) == pixels.shape[1]:
            return read, pixels
        arrived = iter(zip(read, pixels.split(self._cut.chunk, dim=1), strict=False))

        def copied(room: Tensor) -> Chunk:
            chunk, place = next(arrived)
            room[:, : len(chunk)].copy_(place[:, : len(chunk)])
            return chunk

        return _filled(copied, len(read), rooms.take(images))

    def close(self) -> None:
        self._arriving.close()


class _ByDali:
    """Lets DALI decode and crop the plain JPEGs that were read here or by workers."""

    def __init__(self, reading: Reading, cut: Cut, steps: int, *, ahead: int, means: Means) -> None:
        self._chunks = cut.chunks_per_step
        chunks = steps * self._chunks
        reader = LateReader(reading, cut, chunks)
        self._arriving = (
            from_workers(reader, chunks, workers=means.workers, ahead=ahead)
            if means.workers
            else (reader[number] for number in range(chunks))
        )
        self._judge = ChunkReader(reading, cut, chunks, None)
        self._next = 0
        self._has_warned = False
        self._started: deque[LateChunk] = deque()
        self._crops = DaliCrops(
            views=reading.views,
            side=reading.settings.image_size,
            most=cut.chunk,
            threads=max(1, means.workers),
            device=means.device,
        )

    def fill(self, rooms: _Rooms, images: int) -> tuple[list[Chunk], Tensor]:
        return _filled(self._chunk, self._chunks, rooms.take(images))

    def _chunk(self, room: Tensor) -> Chunk:
        while len(self._started) < _IN_HAND and (late := next(self._arriving, None)) is not None:
            if late.jpegs:
                self._crops.start(late.jpegs, late.boxes)
            self._started.append(late)
        late = self._started.popleft()
        number, self._next = self._next, self._next + 1
        try:
            if late.jpegs:
                room[:, late.jpeg_rows] = self._crops.finish()
        except UndecodableError as error:
            return self._judged(number, room, said=str(error))
        for row, views in zip(late.crop_rows, late.crops, strict=True):
            room[:, row] = torch.from_numpy(views).to(room.device)
        return late.chunk

    def _judged(self, number: int, room: Tensor, *, said: str) -> Chunk:
        """Read the whole chunk as if DALI were not there: it does not say which image it was."""
        here = room if room.device.type == "cpu" else torch.empty(room.shape)
        chunk = self._judge.read(number, here)
        if not chunk.unreadable and not self._has_warned:
            self._has_warned = True
            logger.warning("DALI refuses images that Pillow reads, which is slower: %s", said)
        if here is not room:
            room[:, : len(chunk)] = here[:, : len(chunk)].to(room.device)
        return chunk

    def close(self) -> None:
        self._arriving.close()
