"""Crop, resize and mirror: all views of a batch in one launch, straight from its pixels.

The same function in plain PyTorch: `bigsimclr.augment.device.crop_resize`, which multiplies by a
dense matrix for each axis. Here only the four pixels each way are read that may have a weight.
Nothing has a gradient.

Shapes: V views of B images of h x w pixels; H, W height and width of a view.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of the packed places, and rows of a table of taps.
_PLACE = tl.constexpr(5)
_TABLE = tl.constexpr(5)
_TAPS: Final = 4


@dataclass(frozen=True)
class Tile:
    """What one program makes of a view.

    Attributes:
        rows: Rows of the view; the first of them costs up to three rows of pixels more.
        columns: Columns of the view, a power of two.
        warps: Groups of 32 threads that share the columns.
    """

    rows: int
    columns: int
    warps: int


# Seven such tiles make 224 columns without a remainder. A processor holds 32 of these programs,
# with 12 loads of each thread under way.
TILE: Final = Tile(rows=32, columns=32, warps=1)


def pack(
    boxes: npt.NDArray[np.int32], *, flip: npt.NDArray[np.bool_] | None, extent: tuple[int, int]
) -> npt.NDArray[np.int32]:
    """Pack the crops into one array, so that one copy brings it to a device.

    Args:
        boxes: int32 [V,B,4], crops as (y, x, height, width) in pixels.
        flip: bool [V,B], crops to be mirrored left to right; None: none.
        extent: Height and width of the images in pixels.

    Returns:
        int32 [V,B,5].

    Raises:
        ValueError: a box is empty or leaves its image, where the kernel would read other memory.
    """
    ends = boxes[..., :2].astype(np.int64) + boxes[..., 2:]
    wrong = (boxes[..., :2] < 0) | (boxes[..., 2:] < 1) | (ends > np.array(extent))
    if wrong.any():
        box = boxes[wrong.any(axis=-1)][0].tolist()
        raise ValueError(f"box {box} is empty or leaves its image of {extent[0]} x {extent[1]}")
    turned = np.zeros(boxes.shape[:2], np.bool_) if flip is None else flip
    return np.concatenate([boxes, turned[..., None]], axis=-1).astype(np.int32)


@torch.no_grad()
def crop(
    pixels: Tensor,
    places: Tensor,
    *,
    down: Tensor,
    across: Tensor,
    narrow: bool,
    tile: Tile = TILE,
) -> Tensor:
    """Crop and resize a batch of equally large images, several crops of each.

    No pixel outside a crop is read.

    Args:
        pixels: [B,3,h,w] with any strides; uint8, which is divided by 255, or floating.
        places: int32 [V,B,5] on the same device, by `pack`.
        down: float32 [h,5,H]: of each height of a crop from 1 on, the first of the four pixels
            that a row of the view reads, counted from the crop's beginning, and their weights.
            Where a crop has four pixels all of them lie in it.
        across: float32 [w,5,W], the same for columns and widths.
        narrow: Whether a crop may be less than four pixels wide.
        tile: What one program makes of a view.

    Returns:
        float32 [V,B,3,H,W], contiguous and not clipped.

    Raises:
        ValueError: a shape is another one, or places or a table have another type.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be [B,3,h,w]; got {list(pixels.shape)}")
    images = pixels.shape[0]
    if places.ndim != 3 or places.shape[1:] != (images, 5) or places.dtype != torch.int32:
        raise ValueError(
            f"places must be int32 [V,{images},5]; got {places.dtype} {list(places.shape)}"
        )
    for name, table, extent in (
        ("down", down, pixels.shape[2]),
        ("across", across, pixels.shape[3]),
    ):
        if table.ndim != 3 or table.shape[:2] != (extent, 5) or table.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 [{extent},5,size]; got {table.dtype} {list(table.shape)}"
            )
    views, height, width = places.shape[0], down.shape[2], across.shape[2]
    found = torch.empty((views, images, 3, height, width), device=pixels.device)
    if not found.numel():
        return found
    tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    _crop[(images * views * tiles,)](
        pixels,
        places.contiguous(),
        down.contiguous(),
        across.contiguous(),
        found,
        images,
        views,
        *pixels.stride()[:3],
        COLUMN_STRIDE=pixels.stride(3),
        HEIGHT=height,
        WIDTH=width,
        NARROW=narrow,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=1,
    )
    return found


@triton.jit
def _pixel(where, distance: tl.constexpr, width, NARROW: tl.constexpr):
    pixel = tl.load(where, mask=distance < width, other=0) if NARROW else tl.load(where)
    if pixel.dtype == tl.uint8:
        # As the last digits of 2^23 it is a float already: GPUs have few units that convert.
        return (pixel.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return pixel.to(tl.float32)


@triton.jit
def _mix(first, second, third, fourth, weights):
    return weights[0] * first + weights[1] * second + weights[2] * third + weights[3] * fourth


@triton.jit
def _read(line, weights, width, STEP: tl.constexpr, NARROW: tl.constexpr):
    # One channel of a row of pixels -> what it is at the columns of the view.
    return _mix(
        _pixel(line, 0, width, NARROW),
        _pixel(line + STEP, 1, width, NARROW),
        _pixel(line + 2 * STEP, 2, width, NARROW),
        _pixel(line + 3 * STEP, 3, width, NARROW),
        weights,
    )


@triton.jit
def _look_up(table, position, SIZE: tl.constexpr):
    # The first tap and the four weights of rows or columns of the view.
    return tl.load(table + position).to(tl.int32), (
        tl.load(table + SIZE + position),
        tl.load(table + 2 * SIZE + position),
        tl.load(table + 3 * SIZE + position),
        tl.load(table + 4 * SIZE + position),
    )


@triton.jit
def _make_rows(
    pixels,
    row_stride,
    channel_stride,
    height,
    width,
    weights,
    down,
    found,
    is_column,
    begin,
    end,
    COLUMN_STRIDE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    NARROW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Rows of pixels are read from top to bottom, each once, and become rows of the view's columns,
    # of which the last four are kept: those that a row of the view is mixed from.
    # Each its own zeros: Triton takes for one what begins as one.
    red0, red1 = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    red2, red3 = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    green0, green1 = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    green2, green3 = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    blue0, blue1 = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    blue2, blue3 = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    reached = tl.zeros([], tl.int32)
    for row in range(begin, end):
        top, shares = _look_up(down, row, HEIGHT)
        reached = tl.maximum(reached, top)
        # No `for`: Triton 3.6 and 3.7 drop a value that an inner loop has in its bounds alone.
        while reached < top + 4:
            # A crop of less than four rows ends here; what follows has no weight.
            line = pixels + tl.minimum(reached, height - 1).to(tl.int64) * row_stride
            red0, red1, red2 = red1, red2, red3
            green0, green1, green2 = green1, green2, green3
            blue0, blue1, blue2 = blue1, blue2, blue3
            red3 = _read(line, weights, width, COLUMN_STRIDE, NARROW)
            line += channel_stride
            green3 = _read(line, weights, width, COLUMN_STRIDE, NARROW)
            line += channel_stride
            blue3 = _read(line, weights, width, COLUMN_STRIDE, NARROW)
            reached += 1
        target = found + row * WIDTH
        tl.store(target, _mix(red0, red1, red2, red3, shares), mask=is_column)
        target += HEIGHT * WIDTH
        tl.store(target, _mix(green0, green1, green2, green3, shares), mask=is_column)
        target += HEIGHT * WIDTH
        tl.store(target, _mix(blue0, blue1, blue2, blue3, shares), mask=is_column)


# The last batch of an evaluation has its own number of images, and needs no build of its own.
@triton.jit(do_not_specialize=["images"])
def _crop(
    pixels,
    places,
    down,
    across,
    found,
    images,
    views,
    image_stride,
    channel_stride,
    row_stride,
    COLUMN_STRIDE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One program for a tile of a view. All views of an image are made at about the same time, so
    # that its pixels come from memory once.
    ACROSS: tl.constexpr = tl.cdiv(WIDTH, COLUMNS)
    TILES: tl.constexpr = tl.cdiv(HEIGHT, ROWS) * ACROSS
    number = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    image = (number // views).to(tl.int64)
    view = (number % views) * images + image
    place = places + view * _PLACE
    y, x = tl.load(place), tl.load(place + 1)
    height, width = tl.load(place + 2), tl.load(place + 3)

    column = tile % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    # Past the end the last column is made again. A mirrored view takes them from the right.
    source = tl.minimum(column, WIDTH - 1)
    source += tl.load(place + 4) * (WIDTH - 1 - 2 * source)
    left, weights = _look_up(across + (width - 1) * (_TABLE * WIDTH), source, WIDTH)
    if pixels.dtype.element_ty == tl.uint8:
        weights = weights[0] / 255, weights[1] / 255, weights[2] / 255, weights[3] / 255
    begin = tile // ACROSS * ROWS
    pixels += image * image_stride + y.to(tl.int64) * row_stride + (x + left) * COLUMN_STRIDE
    _make_rows(
        pixels,
        row_stride,
        channel_stride,
        height,
        width,
        weights,
        down + (height - 1) * (_TABLE * HEIGHT),
        found + view * (3 * HEIGHT * WIDTH) + column,
        column < WIDTH,
        begin,
        tl.minimum(begin + ROWS, HEIGHT),
        COLUMN_STRIDE,
        HEIGHT,
        WIDTH,
        NARROW,
        COLUMNS,
    )
