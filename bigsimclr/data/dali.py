"""JPEGs to crops by NVIDIA DALI: decoded once, all views cut where they were drawn.

DALI chooses nothing: images, order and boxes come from outside, and what it makes of them depends
on nothing else, so there is no state to save. Its decoder makes the pixels that Pillow makes; its
cubic kernel is the official one (a = -0.5, half-pixel centres, never antialiased) but for the
border of a crop, where DALI repeats the edge and TensorFlow drops the taps outside, and for the
steps in which the weights are tabulated.
"""

import re
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.data.names import printable
from bigsimclr.errors import DataError

_NOT_THE_IMAGES: Final = re.compile("out of memory|cudaError|CUDA_ERROR")
_MOST_TEXT: Final = 300  # characters of a message of DALI's

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


class UndecodableError(Exception):
    """One image of a chunk cannot be decoded; DALI does not say which. The text is DALI's."""


class DaliCrops:
    """Decode and crop chunk after chunk, in order, one ahead of the one that is collected.

    Args:
        views: crops V of each image.
        side: H = W of the crops in pixels.
        most: largest number of images in a chunk.
        threads: of the CPU.
        device: where to decode and crop; a CPU runs the same pipeline.
    """

    def __init__(
        self, *, views: int, side: int, most: int, threads: int, device: torch.device
    ) -> None:
        self._views, self._side, self._most, self._threads = views, side, most, threads
        self._device = device
        self._started: deque[tuple[list[NDArray[np.uint8]], NDArray[np.int32]]] = deque()
        self._pipeline = self._build()

    def start(self, jpegs: Sequence[NDArray[np.uint8]], boxes: NDArray[np.int32]) -> None:
        """Begin a chunk.

        Args:
            jpegs: at least one encoded image, [bytes] each.
            boxes: int32 [V,b,4], crops as (y, x, height, width) in pixels.
        """
        chunk = (list(jpegs), boxes)
        self._started.append(chunk)
        self._feed(*chunk)

    def finish(self) -> Tensor:
        """Return the crops of the first chunk not collected yet.

        Returns:
            float32 [V,b,3,H,W] on the device, not clipped.

        Raises:
            UndecodableError: an image of the chunk cannot be decoded; the chunk is given up.
            DataError: the memory does not suffice, or the device has failed.
        """
        jpegs, _ = self._started.popleft()
        crops = torch.empty(self._views, len(jpegs), 3, self._side, self._side, device=self._device)
        try:
            self._collect(crops)
        except (RuntimeError, ValueError) as error:
            text = printable(" ".join(str(error).split()))[:_MOST_TEXT]
            if _NOT_THE_IMAGES.search(str(error)):
                raise DataError(f"input.decoder: DALI fails; turbo needs no GPU: {text}") from error
            # After an error a pipeline is of no use any more, nor is what it had begun.
            self._pipeline = self._build()
            for chunk in self._started:
                self._feed(*chunk)
            raise UndecodableError(text) from error
        return crops

    def _feed(self, jpegs: list[NDArray[np.uint8]], boxes: NDArray[np.int32]) -> None:
        self._pipeline.feed_input("jpegs", jpegs)
        for view, own in enumerate(boxes):
            self._pipeline.feed_input(f"corners {view}", np.ascontiguousarray(own[:, :2]))
            self._pipeline.feed_input(f"sides {view}", np.ascontiguousarray(own[:, 2:]))
        self._pipeline.schedule_run()

    def _collect(self, crops: Tensor) -> None:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        outputs = self._pipeline.share_outputs()
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for view, found in enumerate(outputs):
                feed_ndarray(found.as_tensor(), crops[view], cuda_stream=stream)
            # DALI writes to its memory again as soon as it is given back.
            stream.synchronize()
        else:
            for view, found in enumerate(outputs):
                feed_ndarray(found.as_tensor(), crops[view])
        self._pipeline.release_outputs()

    def _build(self) -> "Pipeline":
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._most,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            # Deeper, a pipeline begins nothing before it has as many chunks.
            prefetch_queue_depth=1,
        )
        with pipeline:
            jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(
                jpegs,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                # As the reference: rotations noted in the file are ignored, colours interpolated.
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            outputs = []
            for view in range(self._views):
                corner = fn.external_source(name=f"corners {view}", dtype=types.INT32, ndim=1)
                sides = fn.external_source(name=f"sides {view}", dtype=types.INT32, ndim=1)
                # Cut before it is resized: beyond the box there is nothing to be read.
                cut = fn.slice(images, start=corner, shape=sides, axes=[0, 1])
                resized = fn.resize(
                    cut,
                    size=[self._side, self._side],
                    interp_type=types.INTERP_CUBIC,
                    antialias=False,
                    dtype=types.FLOAT,
                )
                outputs.append(fn.transpose(resized * np.float32(1 / 255), perm=[2, 0, 1]))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline
