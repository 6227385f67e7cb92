"""Fused NT-Xent: no logit ever reaches memory, forward or backward.

The plain reference is `losses.nt_xent`. Over several ranks the projections and then one number for
each anchor (at low temperatures two) and the largest weights are gathered; since scores are
symmetric, a rank finds its rows' whole gradient from them, and the backward pass speaks to nobody.

Shapes: B pairs on this rank, N of all ranks, D values of a projection, Q rows of the queue.

Source: the loss of google-research/simclr tf2/objective.py.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from typing_extensions import override

from bigsimclr.kernels import WIDEST_PROJECTION
from bigsimclr.kernels.nt_xent_rows import collect, normalise
from bigsimclr.kernels.nt_xent_slope import leave_unit_sphere, slope
from bigsimclr.kernels.nt_xent_sums import add_up
from bigsimclr.world import World

LOWEST_FIXED: Final = 0.025
"""Temperature down to which exp(-2 / T) and sums of it are normal float32 numbers."""
HOPPER: Final = (9, 0)
BAND: Final = 64
"""Row tiles of one symmetric launch; bounds the memory of the column sums."""
SUMMING: Final = 264
"""Programs of a launch of the sums: two for each multiprocessor of an H100, which hold no more."""
SLOPING: Final = 396
"""Programs of the slope's launch, where it has to be cut for them: three for each."""
COLLECTED: Final = 32
"""Rows of a program that adds pieces up; it waits for memory, so there should be many."""
ROW_VALUES: Final = 2048  # of a program that takes whole rows
SHORTEST_CHUNK: Final = 4  # tiles of columns; in fewer, a program starts longer than it works

Grade = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Tiles:
    """Sides of the tiles, and the warps and pipeline stages that work on one."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Cut:
    """How both passes are cut."""

    sums: Tiles
    slope: Tiles
    summing: int = SUMMING
    sloping: int = SLOPING


def cut_of(width: int, *, split: bool, hopper: bool, online: bool = False) -> Cut:
    """Choose for rows of a width, and for a GPU that multiplies by groups of four warps or not."""
    return Cut(
        sum_tiles(width, split=split, hopper=hopper),
        slope_tiles(width, split=split, online=online),
    )


def sum_tiles(width: int, *, split: bool, hopper: bool) -> Tiles:
    """Choose square tiles for the sums, which are wanted symmetric; none spills registers."""
    if width <= 128:
        if split:
            return Tiles(64, 64, 4, 2)
        return Tiles(128, 128, 4, 2) if hopper else Tiles(128, 128, 8, 3)
    return Tiles(32, 32, 4, 2) if split else Tiles(64, 64, 8, 2)


def slope_tiles(width: int, *, split: bool, online: bool = False) -> Tiles:
    """Choose tiles for the gradient of some rows, which stay in registers; none spills."""
    if width <= 128:
        if split:
            return Tiles(32 if online else 64, 32, 4, 2)
        return Tiles(64, 64, 4, 2)
    return Tiles(16, 32, 8, 1)


def padded_width(values: int) -> int:
    """Return W, the width that projections are padded to."""
    return max(16, 1 << (values - 1).bit_length())


def fused_nt_xent(
    first: Tensor,  # [B, D] projections of the first views, rows contiguous
    second: Tensor,  # [B, D] projections of the second views
    queue: Tensor | None,  # [Q, D] unit rows, further negatives of every anchor, constants
    *,
    temperature: float,
    grade: Grade,
    world: World,
    cut: Cut | None = None,
) -> Tensor:
    """Return the loss [] of `losses.nt_xent`, float32; differentiable once.

    Args:
        first: float32, bfloat16 or float16; compared by cosine.
        second: as `first`.
        queue: past projections.
        temperature: divides the cosines; dimensionless.
        grade: bf16, for training in bfloat16, multiplies in float16: gradients of a few views to
            2e-3 down to a temperature of 0.05 and to 7e-3 at 0.025, closer the more views there
            are. fp32 splits every number into two of float16, for gradients to 5e-6. Positives are
            float32 in both. Below 0.025, where a score counts for more than a half tells, both are
            fp32.
        world: the ranks, each with as many pairs, the same queue and the same upstream gradient.
        cut: of both passes; None: what `cut_of` chooses.

    Raises:
        ValueError: a projection has more than 512 values.
    """
    if first.shape[1] > WIDEST_PROJECTION:
        raise ValueError(
            f"fused NT-Xent takes up to {WIDEST_PROJECTION} values, not {first.shape[1]}"
        )
    online = temperature < LOWEST_FIXED
    split = grade == "fp32" or online
    if cut is None:
        hopper = first.is_cuda and torch.cuda.get_device_capability(first.device) >= HOPPER
        cut = cut_of(padded_width(first.shape[1]), split=split, hopper=hopper, online=online)
    loss: Tensor = _Fused.apply(first, second, queue, _Way(temperature, split, online, world, cut))
    return loss


@dataclass(frozen=True)
class _Operand:
    """Rows as the multipliers take them."""

    units: Tensor  # [.., W] float16: they need no range, and it has three bits more than bfloat16
    rests: Tensor  # [.., W] what was rounded away; `units` again where nothing is split

    @property
    def split(self) -> bool:
        return self.rests is not self.units


@dataclass(frozen=True)
class _Way:
    """How to compute the loss."""

    temperature: float
    split: bool
    online: bool  # with the largest cosine of each row in the place of 1
    world: World
    cut: Cut


class _Fused(Function):
    """The launches."""

    @staticmethod
    @override
    def forward(
        ctx: FunctionCtx,
        first: Tensor,
        second: Tensor,
        queue: Tensor | None,
        way: _Way,
    ) -> Tensor:
        first, second = _rows(first), _rows(second)
        world = way.world
        scale = math.log2(math.e) / way.temperature
        own, positives = _normalised(first, second, split=way.split)
        units = world.gather_views(own.units)
        every = _Operand(units, world.gather_views(own.rests) if own.split else units)
        past = None if queue is None or not len(queue) else _padded(queue, like=own)
        anchors = _anchors(own, every, past, positives, scale=scale, way=way)
        tops, shares = anchors.tops, anchors.shares
        all_shares = world.gather_views(shares)
        all_tops = world.gather_views(tops) if way.online else tops
        queued = own.units.new_empty(0) if past is None else past.units
        ctx.save_for_backward(
            first, second, own.units, own.rests, every.units, every.rests,
            queued, queued if past is None else past.rests,
            anchors.weights, shares, tops, all_shares, all_tops,
            world.gather(anchors.peaks).flatten(),
        )  # fmt: skip
        ctx.settings = way, scale  # type: ignore[attr-defined]
        return anchors.losses.sum()

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused NT-Xent is differentiable once")
        first, second, units, rests, columns, column_rests, *others = ctx.saved_tensors  # type: ignore[attr-defined]
        queue, queue_rests, weights, shares, tops, all_shares, all_tops, peaks = others
        way, scale = ctx.settings  # type: ignore[attr-defined]
        (pairs, values), width = first.shape, units.shape[1]
        tiles = way.cut.slope
        row_tiles = 2 * triton.cdiv(pairs, tiles.rows)
        column_tiles = 2 * triton.cdiv(len(columns) // 2, tiles.columns)
        column_tiles += triton.cdiv(len(queue), tiles.columns)
        chunk = max(triton.cdiv(column_tiles, max(1, way.cut.sloping // row_tiles)), SHORTEST_CHUNK)
        count = triton.cdiv(column_tiles, chunk)
        even = pairs % tiles.rows == 0 and len(columns) // 2 % tiles.columns == 0
        parts = units.new_empty(count, 2 * pairs, width, dtype=torch.float32)
        slope[(row_tiles, count)](
            units, rests, columns, column_rests, queue, queue_rests,
            shares, tops, all_shares, all_tops, peaks, parts,
            pairs, len(columns) // 2, len(queue), len(peaks), way.world.rank * pairs, chunk, scale,
            WIDTH=width, ROWS=tiles.rows, COLUMNS=tiles.columns,
            SPLIT=way.split, HAS_QUEUE=len(queue) > 0, ONLINE=way.online, EVEN=even,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        # A part alone becomes the gradient where it lies, which saves its memory.
        fits = count == 1 and width == values and first.dtype == second.dtype == torch.float32
        slopes = (
            parts[0].chunk(2) if fits else [view.new_empty(view.shape) for view in (first, second)]
        )
        side = max(1, ROW_VALUES // width)
        leave_unit_sphere[(2 * triton.cdiv(pairs, side),)](
            parts, weights, peaks, first, second, *slopes, gradient,
            pairs, count, len(peaks), 1.0 / (way.temperature * pairs),
            first.stride(0), second.stride(0),
            D=values, WIDTH=width, SIDE=side,
        )  # fmt: skip
        return *slopes, None, None


def _rows(views: Tensor) -> Tensor:
    """Return rows without gaps inside."""
    return views if views.stride(1) == 1 else views.contiguous()


def _normalised(first: Tensor, second: Tensor, *, split: bool) -> tuple[_Operand, Tensor]:
    """Return unit rows [2B, W] and the cosines [B] of the positives."""
    pairs, values = first.shape
    width = padded_width(values)
    units = first.new_empty(2 * pairs, width, dtype=torch.float16)
    rests = torch.empty_like(units) if split else units
    positives = first.new_empty(pairs, dtype=torch.float32)
    side = max(1, ROW_VALUES // width)
    normalise[(triton.cdiv(pairs, side),)](
        first, second, units, rests, positives, pairs, first.stride(0), second.stride(0),
        D=values, WIDTH=width, SIDE=side, SPLIT=split,
    )  # fmt: skip
    return _Operand(units, rests), positives


def _padded(queue: Tensor, *, like: _Operand) -> _Operand:
    """Return the queue's unit rows [Q, W] as the multipliers take them."""
    rows = torch.nn.functional.pad(queue.float(), (0, like.units.shape[1] - queue.shape[1]))
    units = rows.to(like.units.dtype)
    return _Operand(units, (rows - units.float()).to(units.dtype) if like.split else units)


@dataclass(frozen=True)
class _Anchors:
    """What is found of this rank's anchors."""

    sums: Tensor  # [2B] of the negatives' entries, while some are left
    tops: Tensor  # [2B] cosines that were subtracted before; empty with a fixed offset
    positives: Tensor  # [B] cosines
    losses: Tensor  # [2B] over B
    weights: Tensor  # [2B] shares of the negatives in negatives and positive together
    shares: Tensor  # [2B] weights over sums
    peaks: Tensor  # the largest weights of every few anchors


def _anchors(
    own: _Operand,
    every: _Operand,
    past: _Operand | None,
    positives: Tensor,
    *,
    scale: float,
    way: _Way,
) -> _Anchors:
    """Take the sums, and what follows from them."""
    pairs = len(positives)
    sums, losses, weights, shares = (positives.new_empty(2 * pairs) for _ in range(4))
    tops = torch.empty_like(sums) if way.online else sums.new_empty(0)
    side = min(COLLECTED, way.cut.sums.rows)
    peaks = sums.new_empty(2 * triton.cdiv(pairs, side))
    anchors = _Anchors(sums, tops, positives, losses, weights, shares, peaks)
    launch = _Sums(own, anchors, scale=scale, way=way, side=side)
    symmetric = way.world.size == 1 and not way.online
    launch.add(every, views=2, symmetric=symmetric, is_first=True, is_last=past is None)
    if past is not None:
        launch.add(past, views=1, symmetric=False, is_first=False, is_last=True)
    return anchors


@dataclass(frozen=True)
class _Sums:
    """Adds columns to the sums of this rank's rows."""

    own: _Operand
    anchors: _Anchors
    scale: float
    way: _Way
    side: int  # rows of a program that adds pieces up

    def add(
        self, columns: _Operand, *, views: int, symmetric: bool, is_first: bool, is_last: bool
    ) -> None:
        """Add all of some columns, a band of rows after the other where each serves both sides."""
        anchors, online, tiles = self.anchors, self.way.online, self.way.cut.sums
        count, width = self.own.units.shape
        pairs, column_pairs = count // 2, len(columns.units) // views
        position = self.way.world.rank * pairs
        row_tiles = 2 * triton.cdiv(pairs, tiles.rows)
        column_tiles = views * triton.cdiv(column_pairs, tiles.columns)
        if symmetric:  # each meets itself and the half that follows it
            column_tiles = row_tiles // 2 + 1
        band = min(BAND, row_tiles) if symmetric else row_tiles
        # A stripe loads its rows once; but there must be work for the whole device.
        stripe = triton.cdiv(column_tiles, max(1, self.way.cut.summing // band))
        stripes = triton.cdiv(column_tiles, stripe)
        even = pairs % tiles.rows == 0 and column_pairs % tiles.columns == 0
        pieces = anchors.sums.new_empty(stripes, count)
        largest = torch.empty_like(pieces) if online else pieces
        mirrored = pieces.new_empty(band, count) if symmetric else pieces
        for start in range(0, row_tiles, band):
            rows = min(band, row_tiles - start)
            add_up[(rows, stripes)](
                self.own.units, self.own.rests, columns.units, columns.rests,
                pieces, largest, mirrored,
                pairs, column_pairs, position, start, stripe, self.scale,
                WIDTH=width, ROWS=tiles.rows, COLUMNS=tiles.columns, VIEWS=views,
                SPLIT=self.own.split, SYMMETRIC=symmetric, ONLINE=online, EVEN=even,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            is_end = start + rows >= row_tiles
            collect[(len(anchors.peaks),)](
                pieces, largest, mirrored, anchors.sums, anchors.tops, anchors.positives,
                anchors.losses, anchors.weights, anchors.shares, anchors.peaks,
                pairs, stripes if is_end else 0, start, rows, self.scale,
                TILE=tiles.rows, SIDE=self.side, FIRST=is_first and start == 0,
                LAST=is_last and is_end, SYMMETRIC=symmetric, ONLINE=online,
            )  # fmt: skip
