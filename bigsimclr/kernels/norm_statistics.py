"""Mean and variance of every channel, in one pass over the values.

The plain code is `torch.var_mean`, as `bigsimclr.models.norm` calls it.

A tensor is a matrix in memory, a row for every image and position: [N, C], or [N, C, H, W] in
channels_last. Programs each take every so many-th tile of its rows, and what they find is joined in
their order. Nothing is atomic: the same inputs give the same bits, on every GPU of a kind.

Shapes: R = N x H x W rows, C channels, P programs along the rows.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_PARTS: Final = 512
"""Parts of a channel's sum, at most; one program holds all of them to join them."""
JOINED: Final = 4096
"""Values of the tile that joins them."""
JOINING_WARPS: Final = 8
_CUTS: Final = 1024
"""Sizes with their tiles that are remembered; a network has some dozens."""


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
    """A tensor's size as a matrix, and its tiles; every launch asks, so that they are made once."""

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
        return Matrix.again(inputs, cut)

    @staticmethod
    def again(
        inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
        cut: Tiles,
    ) -> "Matrix":
        """Look at a tensor of which it is known that the kernels take it."""
        return _matrix(inputs.numel(), inputs.shape[1], cut)

    @cached_property
    def tile_columns(self) -> int:
        """Return the channels of a tile."""
        return min(self.cut.columns, 1 << (self.channels - 1).bit_length())

    @cached_property
    def tile_rows(self) -> int:
        """Return the rows of a tile."""
        return self.cut.values // self.tile_columns

    @cached_property
    def strips(self) -> int:
        """Return how many tiles lie side by side."""
        return (self.channels - 1) // self.tile_columns + 1

    @cached_property
    def tiles(self) -> int:
        """Return how many tiles lie one below the other."""
        return (self.rows - 1) // self.tile_rows + 1

    @cached_property
    def programs(self) -> int:
        """Return how many programs share the tiles of one strip where they sum, P."""
        return max(1, min(self.tiles, self.cut.programs // self.strips, _PARTS))

    @cached_property
    def parts(self) -> int:
        """Return the rows of the tile that joins what P programs found."""
        return 1 << (self.programs - 1).bit_length()

    @cached_property
    def joined_columns(self) -> int:
        """Return the columns of that tile."""
        return JOINED // self.parts


@lru_cache(_CUTS)
def _matrix(values: int, channels: int, cut: Tiles) -> Matrix:
    return Matrix(values // channels, channels, cut)


def suits(
    inputs: Tensor,  # [N, C] or [N, C, H, W]
) -> bool:
    """Say whether the kernels take a tensor: by its type, and by how it lies in memory."""
    if inputs.dtype not in DTYPES or inputs.numel() == 0:
        return False
    if inputs.ndim == 4:
        return inputs.is_contiguous(memory_format=torch.channels_last)
    return inputs.ndim == 2 and inputs.is_contiguous()


def check_channels(name: str, values: Tensor, channels: int) -> None:
    """Refuse what is not one value for each channel, side by side in memory."""
    if values.shape != (channels,) or not values.is_contiguous():
        raise ValueError(
            f"{name} is {list(values.shape)} for inputs of {channels} channels; give one value each"
        )


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
    parts,
    rows,
    channels,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write each program's mean, and sum of squares around it: [P, 2, C]."""
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
    target = own * 2 * channels + column[None, :]
    is_channel = (column < channels)[None, :]
    tl.store(parts + target, shift + summed / count, mask=is_channel)
    tl.store(parts + channels + target, around, mask=is_channel)


@triton.jit(do_not_specialize=["rows", "programs"])
def merge(
    parts,
    statistics,
    running_mean,
    running_variance,
    rows,
    channels,
    programs,
    momentum,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Join all programs' means and squares, in the order of the programs: [2, C].

    The running statistics, where given, are moved towards them.
    """
    part = tl.arange(0, PARTS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = part[:, None] * 2 * channels + column[None, :]
    is_channel = (column < channels)[None, :]
    is_inside = (part < programs)[:, None] & is_channel
    tiles = tl.cdiv(rows, ROWS)
    counts = tl.cdiv(tiles - part, programs) * ROWS
    counts -= tl.where(part == (tiles - 1) % programs, tiles * ROWS - rows, 0)  # a cut last tile
    counts = tl.where(part < programs, counts, 0).to(tl.float32)[:, None]
    means = load_values(parts, place, is_inside)
    first = load_channel(parts, column, channels)
    mean = first + tl.sum(counts * (means - first), 0)[None, :] / rows
    distances = means - mean
    around = load_values(parts + channels, place, is_inside) + counts * distances * distances
    variance = tl.sum(around, 0)[None, :] / rows
    target = column[None, :]
    tl.store(statistics + target, mean, mask=is_channel)
    tl.store(statistics + channels + target, variance, mask=is_channel)
    if running_mean is not None:
        _move(running_mean, mean, column, channels, momentum)
        _move(running_variance, variance, column, channels, momentum)


@triton.jit
def _move(running, new, column, channels, momentum):
    """Do as PyTorch's lerp_, which rounds once after its product, too."""
    old = load_channel(running, column, channels)
    moved = tl.fma(new - old, momentum, old)
    tl.store(running + column[None, :], moved, mask=(column < channels)[None, :])


def batch_statistics(
    inputs: Tensor,  # [N, C] or [N, C, H, W] in channels_last
    tiles: Tiles = MEASURE,
    *,
    running: tuple[Tensor, Tensor] | None = None,  # [C], [C] float32
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [C], [C]: mean and biased variance, float32
    """Take the statistics of each channel over one rank's rows; no gradient flows.

    Args:
        inputs: what to look at.
        tiles: how it is cut.
        running: mean and variance that are moved towards those of the inputs, in place.
        momentum: by which part of the distance.

    Raises:
        ValueError: the kernels do not take the inputs, or the running statistics.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    size = Matrix.of(inputs, tiles)
    rows, channels, programs = size.rows, size.channels, size.programs
    running_mean, running_variance = (None, None) if running is None else running
    if running is not None:
        for values in running:
            if values.dtype != torch.float32:
                raise ValueError(f"the kernels move statistics in float32, not in {values.dtype}")
            check_channels("a running statistic", values, channels)
    parts = inputs.new_empty((programs, 2, channels), dtype=torch.float32)
    measure[(programs * size.strips,)](
        inputs,
        parts,
        rows,
        channels,
        programs,
        ROWS=size.tile_rows,
        COLUMNS=size.tile_columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    statistics = inputs.new_empty((2, channels), dtype=torch.float32)
    merge[((channels - 1) // size.joined_columns + 1,)](
        parts,
        statistics,
        running_mean,
        running_variance,
        rows,
        channels,
        programs,
        momentum,
        ROWS=size.tile_rows,
        PARTS=size.parts,
        COLUMNS=size.joined_columns,
        num_warps=JOINING_WARPS,
    )
    if running is not None:
        increment_version(running)  # autograd does not see what a kernel writes
    mean, variance = statistics.unbind(0)
    return mean, variance
