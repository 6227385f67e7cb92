"""Bicubic resizing by four taps per axis, with the rounding of the official code; numpy only.

Neither kernel smooths before it shrinks: both read four pixels however small the output is.
"""

from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Resize = Literal["tf2", "tf1"]

# TensorFlow tabulates the kernel at 1/1024 of a pixel and rounds every offset to it.
_STEPS: Final = 1024
_KEYS: Final = {"tf2": -0.5, "tf1": -0.75}


def taps(
    lengths: npt.NDArray[np.int64], size: int, resize: Resize
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find which pixels each output pixel reads, and with what weights, along one axis.

    tf2: half-pixel centres, a = -0.5, taps outside the crop dropped and the others renormalised.
    tf1: output i reads at i * length / size, a = -0.75, taps outside the crop moved to its edge.

    Source: TensorFlow resize_bicubic_op.cc, as called by google-research/simclr
    tf2/data_util.py and data_util.py.

    Args:
        lengths: int64 [U], lengths of the crops in pixels.
        size: Length of the output in pixels.
        resize: Which kernel.

    Returns:
        int64 [U,size], position of the first tap in the crop, from -2; float32 [U,size,4],
        weights of the four neighbours from there. Those outside the crop weigh nothing.
    """
    scale = lengths.astype(np.float32)[:, None] / np.float32(size)
    output = np.arange(size, dtype=np.float32)
    if resize == "tf2":
        source = (output + np.float32(0.5)) * scale - np.float32(0.5)
    else:
        source = output * scale
    floor = np.floor(source)
    fraction = np.rint((source - floor) * np.float32(_STEPS)).astype(np.int64)
    near, far = _kernel(_KEYS[resize])
    weight = np.stack(
        [far[fraction], near[fraction], near[_STEPS - fraction], far[_STEPS - fraction]], axis=-1
    )
    first = floor.astype(np.int64) - 1
    index = first[..., None] + np.arange(4)
    edge = np.clip(index, 0, lengths[:, None, None] - 1)
    outside = index != edge
    kept = np.where(outside, np.float32(0), weight)
    if resize == "tf2":
        return first, kept / kept.sum(axis=-1, keepdims=True)
    moved = np.where(outside, weight, np.float32(0))
    for tap in range(4):
        at_edge = np.arange(4) == (edge - first[..., None])[..., tap, None]
        kept = kept + at_edge * moved[..., tap, None]
    return first, kept


def tap_table(longest: int, size: int, resize: Resize) -> npt.NDArray[np.float32]:
    """Tabulate the taps of all crops along one axis, as `bigsimclr.kernels.crop` reads them.

    Args:
        longest: Length of the longest crop in pixels.
        size: Length of the output in pixels.
        resize: Which kernel.

    Returns:
        float32 [longest,5,size]: for each length from 1 on the position of the first tap in the
        crop, and the weights of the four neighbours from there. They are those of `taps`, moved
        along until all four lie in the crop, or begin with it if it is shorter.
    """
    lengths = np.arange(1, longest + 1)
    first, weight = taps(lengths, size, resize)
    begin = np.clip(first, 0, np.maximum(lengths[:, None] - 4, 0))
    # What is outside weighs nothing, so whatever is moved over an end may be dropped.
    index = (begin - first)[..., None] + np.arange(4)
    kept = np.take_along_axis(weight, np.clip(index, 0, 3), axis=-1)
    kept = np.where((index >= 0) & (index < 4), kept, np.float32(0))
    table = np.empty((longest, 5, size), np.float32)
    table[:, 0] = begin
    table[:, 1:] = kept.transpose(0, 2, 1)
    return table


@lru_cache
def _kernel(a: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    # float32 [1025] each: the cubic kernel at distances 0..1 and 1..2.
    near = np.arange(_STEPS + 1, dtype=np.float64) / _STEPS
    far = near + 1
    inner = ((a + 2) * near - (a + 3)) * near * near + 1
    outer = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    return inner.astype(np.float32), outer.astype(np.float32)
