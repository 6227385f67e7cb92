"""Images as a strided first convolution likes them: what a stride of 2 passes over as channels.

A convolution of stride 2 over three channels leaves most of a multiplier's width empty, which
libraries fill by padding the channels in passes of their own. Folding writes every two by two
pixels as twelve channels of one position, and four zeros, with the zeros around the image: a
convolution of stride 1 without padding, whose kernel is half as long, then takes the same sums. The
plain code is the convolution itself, `bigsimclr.models.layers.FirstConvolution`.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

COLOURS: Final = 3
FOLDED: Final = 16
"""Channels of a position: a row of 32 bytes in 16 bits."""


@dataclass(frozen=True)
class Tiles:
    """What a program works on."""

    positions: int  # of a row
    warps: int


FOLD: Final = Tiles(positions=128, warps=4)
"""A row of an image of 224 pixels, 115 positions, is one program's."""


def suits(kernel: int, images: Tensor) -> bool:
    """Say whether a convolution of stride 2 over images [N, 3, H, W] can be folded.

    Its kernel is padded by a zero in front, and by half its length around the image. No gradient
    flows to the images.
    """
    return (
        kernel % 4 == 3
        and images.ndim == 4
        and images.shape[1] == COLOURS
        and images.shape[2] % 2 == 0
        and images.shape[3] % 2 == 0
        and images.dtype in {torch.float32, torch.bfloat16, torch.float16}
        and not images.requires_grad
        and images.numel() > 0
    )


@triton.jit
def fold(
    images,
    folded,
    height,
    width,
    down,
    across,
    image_stride,
    colour_stride,
    row_stride,
    column_stride,
    FRONT: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write some positions of one row [across, 16]."""
    pieces = tl.cdiv(across, POSITIONS)
    row = tl.program_id(0) // pieces
    begin = tl.program_id(0) % pieces * POSITIONS
    image, y = row // down, row % down
    x = begin + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    colour, neighbour = channel % 3, channel // 3
    pixel_row = 2 * (y - FRONT) + neighbour // 2
    pixel = 2 * (x - FRONT) + neighbour % 2
    is_inside = (neighbour < 4) & (pixel_row >= 0) & (pixel_row < height)
    is_inside &= (pixel >= 0) & (pixel < width)
    place = colour * colour_stride + pixel_row * row_stride + pixel * column_stride
    source = images + tl.cast(image, tl.int64) * image_stride
    values = tl.load(source + place, mask=is_inside, other=0.0)
    target = folded + (tl.cast(row, tl.int64) * across + begin) * CHANNELS
    at = tl.arange(0, POSITIONS)[:, None] * CHANNELS + channel
    tl.store(target + at, values.to(folded.dtype.element_ty), mask=x < across)


def fold_images(
    images: Tensor,  # [N, 3, H, W], any strides
    *,
    kernel: int,
    dtype: torch.dtype,
    tiles: Tiles = FOLD,
) -> Tensor:  # [N, 16, H', W'] channels_last
    """Write images as a convolution of stride 1 takes them; see `suits`.

    Shapes: H' = H / 2 + (K - 1) / 2 for a kernel of K pixels, so that (K + 1) / 2 positions fit in
    H / 2 times; W' likewise.

    Args:
        images: float32, bfloat16 or float16.
        kernel: side of the convolution's kernel in pixels.
        dtype: of what is written.
        tiles: what a program works on.
    """
    count, _, height, width = images.shape
    front, beyond = _front(kernel), (kernel - 1) // 2
    down, across = height // 2 + beyond, width // 2 + beyond
    folded = torch.empty(
        (count, FOLDED, down, across),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    fold[(count * down * triton.cdiv(across, tiles.positions),)](
        images,
        folded,
        height,
        width,
        down,
        across,
        *images.stride(),
        FRONT=front,
        POSITIONS=tiles.positions,
        CHANNELS=FOLDED,
        num_warps=tiles.warps,
    )
    return folded


def fold_weight(
    weight: Tensor,  # [C, 3, K, K]
) -> Tensor:  # [C, 16, (K + 1) / 2, (K + 1) / 2] channels_last
    """Arrange a kernel as `fold_images` arranges images; gradients flow."""
    width, _, kernel, _ = weight.shape
    half = (kernel + 1) // 2
    # Tap 2t + p of the padded kernel meets the pixel p of the two in the t-th position.
    cut = F.pad(weight, (1, 0, 1, 0)).view(width, COLOURS, half, 2, half, 2)
    channels = cut.permute(0, 3, 5, 1, 2, 4).reshape(width, 4 * COLOURS, half, half)
    whole = F.pad(channels, (0, 0, 0, 0, 0, FOLDED - 4 * COLOURS))
    return whole.contiguous(memory_format=torch.channels_last)


def _front(kernel: int) -> int:
    """Return the positions before an image that a kernel reaches."""
    return ((kernel - 1) // 2 + 1) // 2
