"""Mean and variance of every channel, in one pass over the values.

The plain code is `torch.var_mean`, as `bigsimclr.models.norm` calls it.

A tensor is a matrix in memory, a row for every image and position: [N, C], or [N, C, H, W] in
channels_last. Programs each take every so many-th tile of its rows, and what they find is joined in
their order. Nothing is atomic: the same inputs give the same bits, on every GPU of a kind.

Shapes: R = N x H x W rows, C channels, P programs along the rows.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_PARTS: Final = 512
"""Parts of a channel's sum, at most; one program holds all of them to join them."""
_JOINED: Final = 4096
"""Values of the tile that joins them."""
_JOINING_WARPS: Final = 8


@dataclass(frozen=True)
class Tiles:
    """What a program works on at a time, and with what."""

    values: int  # of a tile
    columns: int  # channels of a tile, where there are as many
    warps: int
    stages: int = 1  # tiles under way in a loop over them, the one at work included
    programs: int = 1  # that share the rows of all strips where they are summed


MEASURE: Final = Tiles(values=2048, columns=64, warps=4, stages=4, programs=528)
"""16 values of each of 128 threads, which are two loads of 16 bytes in 16 bits; rows of a whole
cache line of 128 bytes. Three tiles are on their way while one is summed: 48 KB for each processor.
Four programs on each of an H100's 132 processors run at once, where none takes more than 128
registers. The same on every GPU, and so are the sums."""


@dataclass(frozen=True)
class Matrix:
    """A tensor's size as a matrix, and its tiles."""

    rows: int  # R
    channels: int  # C
    cut: Tiles

    @staticmethod
    def of(
        inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
        cut: Tiles,
    ) -> "Matrix":
        """Look at a tensor.

        Raises:
            ValueError: the kernels do not take it.
        """
        if not suits(inputs):
            raise ValueError(
                f"inputs {list(inputs.shape)} {inputs.dtype} with strides {inputs.stride()}: the "
                "kernels take [N, C], and [N, C, H, W] in channels_last, of 32 or 16 bits"
            )
        channels = inputs.shape[1]
        return Matrix(inputs.numel() // channels, channels, cut)

    @property
    def tile_columns(self) -> int:
        """Return the channels of a tile."""
        return min(self.cut.columns, 1 << (self.channels - 1).bit_length())

    @property
    def tile_rows(self) -> int:
        """Return the rows of a tile."""
        return self.cut.values // self.tile_columns

    @property
    def strips(self) -> int:
        """Return how many tiles lie side by side."""
        return (self.channels - 1) // self.tile_columns + 1

    @property
    def tiles(self) -> int:
        """Return how many tiles lie one below the other."""
        return (self.rows - 1) // self.tile_rows + 1

    @property
    def programs(self) -> int:
        """Return how many programs share the tiles of one strip where they sum, P."""
        return max(1, min(self.tiles, self.cut.programs // self.strips, _PARTS))


def suits(
    inputs: Tensor,  # [N, C] or [N, C, H, W]
) -> bool:
    """Say whether the kernels take a tensor: by its type, and by how it lies in memory."""
    if inputs.dtype not in DTYPES or inputs.numel() == 0:
        return False
    if inputs.ndim == 4:
        return inputs.is_contiguous(memory_format=torch.channels_last)
    return inputs.ndim == 2 and inputs.is_contiguous()


@triton.jit
def load_values(pointer, place, is_inside):
    """Read a tile as float32; zero where there is nothing."""
    return tl.load(pointer + place, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def load_channel(pointer, column, channels):
    """Read a row [1, C'] of one value per channel as float32."""
    return tl.load(pointer + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def locate(tile, rows, column, channels, ROWS: tl.constexpr):
    """Return where a tile begins in memory, and which of its values exist."""
    begin = tl.cast(tile, tl.int64) * ROWS * channels  # may pass 2^31
    is_row = tl.arange(0, ROWS) < rows - tile * ROWS
    return begin, is_row[:, None] & (column < channels)[None, :]


@triton.jit(do_not_specialize=["rows", "programs"])
def measure(
    inputs,
    means,
    squares,
    rows,
    channels,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write each program's mean [P, C], and sum of squares around it [P, C]."""
    strips = tl.cdiv(channels, COLUMNS)
    own = tl.program_id(0) // strips
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * channels + column[None, :]
    tiles = tl.cdiv(rows, ROWS)
    begin, is_inside = locate(own, rows, column, channels, ROWS)
    values = load_values(inputs + begin, place, is_inside)
    # Distances are taken from the mean of the program's first tile. Its rows are among those that
    # are summed, so the squares are at most one plus the number of tiles times those around the
    # mean of all, and as a rule hardly more: few digits cancel, however far from zero the mean is.
    count = tl.minimum(rows - own * ROWS, ROWS)
    shift = tl.sum(values, 0)[None, :] / count
    distances = tl.where(is_inside, values - shift, 0.0)
    total = distances
    square = distances * distances
    for tile in tl.range(own + programs, tiles, programs, num_stages=STAGES):
        begin, is_inside = locate(tile, rows, column, channels, ROWS)
        distances = tl.where(is_inside, load_values(inputs + begin, place, is_inside) - shift, 0.0)
        total += distances
        square += distances * distances
        count += tl.minimum(rows - tile * ROWS, ROWS)
    summed = tl.sum(total, 0)[None, :]
    around = tl.sum(square, 0)[None, :] - summed * summed / count
    around = tl.where(around < 0.0, 0.0, around)  # NaN stays
    target = own * channels + column[None, :]
    is_channel = (column < channels)[None, :]
    tl.store(means + target, shift + summed / count, mask=is_channel)
    tl.store(squares + target, around, mask=is_channel)


@triton.jit(do_not_specialize=["rows", "programs"])
def merge(
    means,
    squares,
    mean,
    variance,
    rows,
    channels,
    programs,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join all programs' means and squares, in the order of the programs."""
    part = tl.arange(0, PARTS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = part[:, None] * channels + column[None, :]
    is_channel = (column < channels)[None, :]
    is_inside = (part < programs)[:, None] & is_channel
    tiles = tl.cdiv(rows, ROWS)
    counts = tl.cdiv(tiles - part, programs) * ROWS
    counts -= tl.where(part == (tiles - 1) % programs, tiles * ROWS - rows, 0)  # a cut last tile
    counts = tl.where(part < programs, counts, 0).to(tl.float32)[:, None]
    parts = load_values(means, place, is_inside)
    first = load_channel(means, column, channels)
    whole = first + tl.sum(counts * (parts - first), 0)[None, :] / rows
    distances = parts - whole
    around = load_values(squares, place, is_inside) + counts * distances * distances
    tl.store(mean + column[None, :], whole, mask=is_channel)
    tl.store(variance + column[None, :], tl.sum(around, 0)[None, :] / rows, mask=is_channel)


def batch_statistics(
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    tiles: Tiles = MEASURE,
) -> tuple[Tensor, Tensor]:  # [C], [C]: mean and biased variance, float32
    """Take the statistics of each channel over one rank's rows; no gradient flows.

    Raises:
        ValueError: the kernels do not take the inputs.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    size = Matrix.of(inputs, tiles)
    programs = size.programs
    means, squares = inputs.new_empty(2, programs, size.channels, dtype=torch.float32)
    measure[(programs * size.strips,)](
        inputs,
        means,
        squares,
        size.rows,
        size.channels,
        programs,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    mean, variance = inputs.new_empty(2, size.channels, dtype=torch.float32)
    parts = 1 << (programs - 1).bit_length()
    merge[((size.channels - 1) // (_JOINED // parts) + 1,)](
        means,
        squares,
        mean,
        variance,
        size.rows,
        size.channels,
        programs,
        ROWS=size.tile_rows,
        PARTS=parts,
        COLUMNS=_JOINED // parts,
        num_warps=_JOINING_WARPS,
    )
    return mean, variance
