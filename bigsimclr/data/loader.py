"""Batches from a source: a pure function of (seed, examples seen), whatever reads them.

Neither the number of workers, nor the rank, nor the world size, nor where a run was resumed
changes which images come, in what order, or how they are drawn.

Shapes: B images of this rank in one step; V views; H = W pixels of a view.
"""

import hashlib
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import Draws, centre_draws, draw_views
from bigsimclr.data import EqualImages, Source
from bigsimclr.data.ahead import one_ahead
from bigsimclr.data.chunks import Chunk, Reading
from bigsimclr.data.names import counted
from bigsimclr.data.order import Arranged, Cut, order_of
from bigsimclr.data.resident import Resident
from bigsimclr.data.steps import ALONE, Means, chunk_images, read_steps
from bigsimclr.errors import DataError

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """This rank's images of one step, and what is to happen to them."""

    pixels: Tensor  # uint8 [B,3,h,w] whole images, or float32 [V,B,3,H,W] cropped already
    draws: Draws
    labels: Tensor  # int64 [B], -1 where there is none
    indices: Tensor  # int64 [B], images shown, by their index in the source

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, images: int) -> list["Batch"]:
        """Cut into pieces of `images` images; the last one may be shorter."""
        return [self._piece(slice(at, at + images)) for at in range(0, len(self), images)]

    def _piece(self, rows: slice) -> "Batch":
        whole = self.pixels.dim() == 4
        return Batch(
            pixels=self.pixels[rows] if whole else self.pixels[:, rows],
            draws=self.draws.take(rows),
            labels=self.labels[rows],
            indices=self.indices[rows],
        )

    @staticmethod
    def join(pieces: Sequence["Batch"]) -> "Batch":
        """Put pieces one behind the other; the opposite of `split`."""
        if len(pieces) == 1:
            return pieces[0]
        across = 0 if pieces[0].pixels.dim() == 4 else 1
        return Batch(
            pixels=torch.cat([piece.pixels for piece in pieces], dim=across),
            draws=Draws.stack([piece.draws for piece in pieces]),
            labels=torch.cat([piece.labels for piece in pieces]),
            indices=torch.cat([piece.indices for piece in pieces]),
        )


def view_hash(batch: Batch) -> str:
    """Hash which images a batch shows and everything drawn for them; sha256 in hex.

    Pieces of ranks or of several steps hash as one whole after `Batch.join`.
    """
    digest = hashlib.sha256(batch.indices.numpy().astype("<i8").tobytes())
    digest.update(batch.labels.numpy().astype("<i8").tobytes())
    for entry in fields(batch.draws):
        values = np.ascontiguousarray(getattr(batch.draws, entry.name))
        digest.update(f"{entry.name} {values.dtype.str} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


class Loader:
    """Endless training batches of one rank, from any position."""

    def __init__(  # noqa: PLR0913 - each is a key of the recipe or a fact of this process
        self,
        source: Source,
        *,
        indices: Integers,  # [M] the images to show, by their index in the source
        labels: Integers,  # [N] class numbers by index; -1 hides a label
        settings: ViewSettings,
        views: int,  # V
        seed: int,
        global_batch: int,  # images of one step over all ranks
        rank: int = 0,
        world_size: int = 1,
        means: Means = ALONE,
        unreadable_limit: float = 0.001,  # share of the M images that may be replaced
        max_pixels: int = 64_000_000,
    ) -> None:
        if len(indices) == 0:
            raise DataError("there are no images to train on")
        self.unreadable: dict[str, str] = {}  # name -> reason, of images replaced so far
        self._source = source
        self._global_batch = global_batch
        self._low = rank * global_batch // world_size
        self._high = (rank + 1) * global_batch // world_size
        self._means = means
        self._limit = _Limit(share=unreadable_limit, images=len(indices))
        self._reading = Reading(
            source=source,
            order=order_of(
                indices, seed, source.arrangement if isinstance(source, Arranged) else None
            ),
            indices=indices,
            labels=labels,
            settings=settings,
            views=views,
            max_pixels=max_pixels,
            turbo=means.decoder == "turbo",
        )

    def batches(self, first_example: int, steps: int) -> Iterator[Batch]:
        """Yield the batches of `steps` steps, the first at position `first_example`.

        Raises:
            DataError: more images than the limit cannot be read, or a worker process died.
        """
        return _brought(self._read(first_example, steps), self._means.device)

    def _read(self, first_example: int, steps: int) -> Generator[Batch, None, None]:
        cut = Cut(
            first_example=first_example,
            step_examples=self._global_batch,
            low=self._low,
            high=self._high,
            chunk=chunk_images(self._reading, self._means),
        )
        if isinstance(self._source, EqualImages | Resident):
            for number in range(steps):
                yield _gathered(self._source, self._reading, cut.step(number))
            return
        with closing(read_steps(self._reading, cut, steps=steps, means=self._means)) as read:
            for chunks, pixels in read:
                for chunk in chunks:
                    self._limit.count(chunk, self.unreadable, self.unreadable, "replaced")
                batch = _joined(chunks, pixels)
                if batch is None or len(batch) < self._high - self._low:
                    raise DataError(
                        f"no readable image was found: {self._limit.summary(self.unreadable)}"
                    )
                yield batch


def _brought(
    batches: Generator[Batch, None, None], device: torch.device
) -> Generator[Batch, None, None]:
    """Bring the pixels to a GPU while the batch before is used; a CPU has them already."""
    if device.type != "cuda":
        yield from batches
        return
    with closing(one_ahead(_copied(batches, device))) as copied:
        for batch, done in copied:
            present = torch.cuda.current_stream(device)
            present.wait_event(done)
            # Its memory is of the other stream, which must not use it again too early.
            batch.pixels.record_stream(present)
            yield batch


def _copied(
    batches: Generator[Batch, None, None], device: torch.device
) -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
    aside = torch.cuda.Stream(device)
    with closing(batches):
        while True:
            # Entered anew for each batch: the next one may be another thread's.
            with torch.cuda.device(device), torch.cuda.stream(aside):
                batch = next(batches, None)
                if batch is None:
                    return
                pixels = batch.pixels
                if not pixels.is_cuda and not pixels.is_pinned():
                    pixels = pixels.pin_memory()
                batch = replace(batch, pixels=pixels.to(device, non_blocking=True))
                done = aside.record_event()
            yield batch, done


def evaluation_batches(
    source: Source,
    *,
    indices: Integers,  # [M] the images to show, in this order
    settings: ViewSettings,
    batch_size: int,
    means: Means = ALONE,
    unreadable_limit: float = 0.001,  # share of the M images that may be left out
    max_pixels: int = 64_000_000,
    unreadable: dict[str, str] | None = None,  # name -> reason; what is left out is added to it
) -> Iterator[Batch]:
    """Yield every image once with its centre crop (V = 1); the last batch may be short.

    Images that cannot be read are left out and logged by name, unless `unreadable` names them
    already; `Batch.indices` says what was shown. An `unreadable_limit` of 1 leaves out whatever
    cannot be read, be it every image.

    Raises:
        DataError: more images than the limit cannot be read, or a worker process died.
    """
    batches = _read_once(
        source,
        indices=indices,
        settings=settings,
        batch_size=batch_size,
        means=means,
        unreadable_limit=unreadable_limit,
        max_pixels=max_pixels,
        unreadable=unreadable,
    )
    return _brought(batches, means.device)


def _read_once(
    source: Source,
    *,
    indices: Integers,
    settings: ViewSettings,
    batch_size: int,
    means: Means,
    unreadable_limit: float,
    max_pixels: int,
    unreadable: dict[str, str] | None,
) -> Generator[Batch, None, None]:
    reading = Reading(
        source=source,
        order=None,
        indices=indices,
        labels=source.labels,
        settings=settings,
        views=1,
        max_pixels=max_pixels,
        turbo=means.decoder == "turbo",
    )
    cut = Cut(
        first_example=0,
        step_examples=batch_size,
        low=0,
        high=batch_size,
        chunk=chunk_images(reading, means),
        end=len(indices),
    )
    steps = math.ceil(len(indices) / batch_size)
    if isinstance(source, EqualImages | Resident):
        for number in range(steps):
            yield _gathered(source, reading, cut.step(number))
        return
    limit, found = _Limit(share=unreadable_limit, images=len(indices)), dict[str, str]()
    told = {} if unreadable is None else unreadable
    with closing(read_steps(reading, cut, steps=steps, means=means)) as read:
        for chunks, pixels in read:
            for chunk in chunks:
                limit.count(chunk, found, told, "left out")
            batch = _joined(chunks, pixels)
            if batch is not None:
                yield batch


@dataclass(frozen=True)
class _Limit:
    """How many images may be unreadable before a run stops."""

    share: float
    images: int

    @property
    def allowed(self) -> int:
        # The small term keeps 0.1 x 30 images at 3, where floating point says 3.0000000000000004.
        return math.ceil(self.share * self.images - 1e-9)

    def count(
        self, chunk: Chunk, found: dict[str, str], told: dict[str, str], consequence: str
    ) -> None:
        """Add what a chunk could not read, name it once, and stop above the limit.

        Args:
            chunk: what was read.
            found: images that count against the limit, name -> reason.
            told: images that were named before; may be `found` itself.
            consequence: what happens to an image that cannot be read.
        """
        if chunk.failure:
            raise DataError(chunk.failure)
        for name, reason in chunk.unreadable.items():
            is_told = name in told
            found[name] = told[name] = reason
            # Beyond the limit nothing is replaced or left out any more: the run stops.
            if not is_told and len(found) <= self.allowed:
                most = f" ({len(found)} of at most {self.allowed})" if self.share < 1 else ""
                logger.warning("%s cannot be read and is %s%s: %s", name, consequence, most, reason)
        if len(found) > self.allowed:
            raise DataError(
                f"{self.summary(found)}. input.unreadable_limit={self.share:g} allows"
                f" {self.allowed}: repair or remove them, or raise it"
            )

    def summary(self, found: dict[str, str]) -> str:
        name, reason = next(iter(found.items()))
        return (
            f"{len(found)} of {counted(self.images, 'image')} ({len(found) / self.images:.2%})"
            f" cannot be read, first {name}: {reason}"
        )


def _gathered(source: EqualImages | Resident, reading: Reading, positions: Integers) -> Batch:
    # Equal images in memory: one gather for the whole batch; crops are made on the device.
    height, width = source.image_size or (0, 0)
    sizes = np.tile(np.array([height, width], np.int32), (len(positions), 1))
    if reading.order is None:
        indices = reading.indices[positions]
        draws = centre_draws(reading.settings, sizes)
    else:
        epochs, indices = reading.order.at(positions)
        draws = draw_views(
            reading.settings,
            seed=reading.order.seed,
            epochs=epochs,
            indices=indices,
            sizes=sizes,
            views=reading.views,
        )
    if isinstance(source, Resident):
        pixels = source.gather(indices)
    else:
        pixels = torch.from_numpy(source.read_many(indices))
    return Batch(
        pixels=pixels.permute(0, 3, 1, 2),
        draws=draws,
        labels=torch.from_numpy(reading.labels[indices]),
        indices=torch.from_numpy(indices),
    )


def _joined(chunks: Sequence[Chunk], pixels: Tensor) -> Batch | None:
    shown = [chunk for chunk in chunks if len(chunk)]
    if not shown:
        return None
    return Batch(
        pixels=pixels,
        draws=Draws.stack([chunk.draws for chunk in shown]),
        labels=torch.from_numpy(np.concatenate([chunk.labels for chunk in shown])),
        indices=torch.from_numpy(np.concatenate([chunk.indices for chunk in shown])),
    )
