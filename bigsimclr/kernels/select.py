"""Selective kernels between their convolutions: two passes over memory forward, two backward.

The plain reference is `bigsimclr.models.selective`: batch norm and ReLU make two streams, their
means choose softmax weights for every image and channel, and the weights mix the streams. Here no
stream is ever written. With t values in the mixed result, and the batch's statistics not counted:

* `pool` reads the convolution's result y (2t) and sums the streams over the positions.
* `mix` reads y again and writes the mixed streams (3t).
* Backward, `mix` reads y and its gradient g (3t), and sums g and g yhat where the ReLU is open.
  Weights m and the pooled means' gradient d are constant in an image and channel, so that
  dz = open (g m + d / positions), and these sums beside two of the forward pass give the gradient
  of m and all that batch norm's gradient sums over the batch.
* Then `pool` reads y and g and writes the gradient of y (5t).

Shapes: N images, F features of a stream, C = 2F channels, the first stream's before the second's,
H x W or P positions. y is channels_last, that is [N, P, C] in memory.

Everything is summed in float32, in an order that depends on the shape alone.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from bigsimclr.world import World

TILE_POSITIONS = 32
TILE_FEATURES = 64  # 128 bytes of a row in 16 bits: a whole line of the cache
_TILE_P = tl.constexpr(TILE_POSITIONS)
_TILE_F = tl.constexpr(TILE_FEATURES)
# Two tiles of 4 to 8 KB are under way for each program beside the one at work. An H100 holds 4 or
# 5 programs per processor: 32 KB and more, where 3.3 TB/s and 0.7 us of latency want 18.
_STAGES = tl.constexpr(3)
# 132 processors hold 528 to 660 at once; a few rounds even out their ends.
_PROGRAMS = 2048


@dataclass(frozen=True)
class Norm:
    """The batch norm of both streams in one training forward pass."""

    mean: Tensor  # [C] float32, of the ranks' batches together
    variance: Tensor  # [C] float32, biased
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    epsilon: float
    world: World  # the ranks that share the statistics


@dataclass
class Handover:
    """What the backward pass of `mix` leaves for that of `pool`, of the same forward pass.

    It is empty in the forward pass: what that keeps goes through autograd, so that a checkpoint can
    leave it out and compute it again.
    """

    _left: tuple[Tensor, Tensor, Tensor] | None = None

    def put(self, gradient: Tensor, sums: Tensor, chosen: Tensor) -> None:
        """Leave the gradient of the mixed streams, its sums [2, N, C] and the weights [N, C]."""
        self._left = gradient, sums, chosen

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what was left, and hold it no longer.

        Raises:
            RuntimeError: nothing was left: the pooled means lead past `mix`.
        """
        if self._left is None:
            raise RuntimeError("the gradient of pooled streams follows that of the mixed ones")
        left, self._left = self._left, None
        return left


def pool(
    inputs: Tensor,  # [N, C, H, W] channels_last; float32, bfloat16 or float16
    norm: Norm,
    handover: Handover,
) -> Tensor:  # [N, C] float32
    """Average both streams relu(norm(inputs)) over the positions.

    The gradient of inputs, weight and bias is that of `mix` as well: what this returns must lead
    to the weights that mix, and nowhere else.

    Raises:
        ValueError: the inputs have another memory format or type, or are no two streams.
    """
    if not inputs.is_contiguous(memory_format=torch.channels_last) or inputs.shape[1] % 2:
        raise ValueError(f"not two streams in channels_last: {list(inputs.shape)}")
    if inputs.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"the kernels compute in float32, and take no {inputs.dtype}")
    pooled: Tensor = _Pool.apply(inputs, norm.weight, norm.bias, norm, handover)
    return pooled


def mix(
    inputs: Tensor,  # [N, C, H, W], those of `pool`
    norm: Norm,
    chosen: Tensor,  # [N, C] weights of the first stream, then of the second; any float type
    handover: Handover,
) -> Tensor:  # [N, F, H, W] as inputs
    """Sum the two streams relu(norm(inputs)), weighted.

    The gradient of the weights comes from here, and all others from `pool`.
    """
    mixed: Tensor = _Mix.apply(inputs.detach(), chosen.contiguous(), norm, handover)
    return mixed


class _Pool(Function):
    @staticmethod
    @override
    def forward(
        ctx, inputs: Tensor, weight: Tensor, bias: Tensor, norm: Norm, handover: Handover
    ) -> Tensor:
        cut = _Cut.of(inputs)
        partial = inputs.new_empty((cut.parts, 3, cut.N, 2 * cut.F), dtype=torch.float32)
        kept = inputs, norm.mean, norm.variance, weight, bias
        _pool[(2 * cut.programs,)](*kept, partial, *cut.sizes, norm.epsilon)
        sums = _summed(partial)
        ctx.save_for_backward(*kept, sums[1:])
        ctx.epsilon, ctx.world, ctx.handover = norm.epsilon, norm.world, handover
        return sums[0] / cut.P

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx, pooled_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, opened = ctx.saved_tensors
        inputs, _, _, weight, bias = kept
        gradient, sums, chosen = ctx.handover.take()
        cut = _Cut.of(inputs)
        everywhere = pooled_gradient.contiguous() / cut.P
        # [2, C]: of dz, and of dz yhat.
        own = torch.addcmul(sums * chosen, opened, everywhere).sum(1)
        toward = None
        if ctx.needs_input_grad[0]:
            toward = torch.empty_like(inputs)
            total = ctx.world.total(own)
            share = 1 / (cut.N * cut.P * ctx.world.size)
            given = gradient, chosen, everywhere, total, share
            _pool_backward[(2 * cut.programs,)](*kept, *given, toward, *cut.sizes, ctx.epsilon)
        own_bias, own_weight = own
        return toward, own_weight.to(weight.dtype), own_bias.to(bias.dtype), None, None


class _Mix(Function):
    @staticmethod
    @override
    def forward(ctx, inputs: Tensor, chosen: Tensor, norm: Norm, handover: Handover) -> Tensor:
        cut = _Cut.of(inputs)
        mixed = torch.empty(
            (cut.N, cut.F, *inputs.shape[2:]),
            dtype=inputs.dtype,
            device=inputs.device,
            memory_format=torch.channels_last,
        )
        kept = inputs, norm.mean, norm.variance, norm.weight, norm.bias
        _mix[(cut.programs,)](*kept, chosen, mixed, *cut.sizes, norm.epsilon)
        ctx.save_for_backward(*kept, chosen)
        ctx.epsilon, ctx.handover = norm.epsilon, handover
        return mixed

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, chosen = ctx.saved_tensors
        inputs, _, _, weight, bias = kept
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        cut = _Cut.of(inputs)
        partial = inputs.new_empty((cut.parts, 2, cut.N, 2 * cut.F), dtype=torch.float32)
        _mix_backward[(2 * cut.programs,)](*kept, gradient, partial, *cut.sizes, ctx.epsilon)
        sums = _summed(partial)
        ctx.handover.put(gradient, sums, chosen)
        # Where it is open, a stream is bias + weight yhat.
        toward = torch.addcmul(sums[0] * bias, sums[1], weight)
        return None, toward.to(chosen.dtype), None, None


@dataclass(frozen=True)
class _Cut:
    """How the work is cut: each program has some features and a part of an image's positions."""

    N: int
    P: int
    F: int
    parts: int  # of an image
    tiles: int  # of a part

    @classmethod
    def of(cls, inputs: Tensor) -> "_Cut":
        images, channels, height, width = inputs.shape
        positions, features = height * width, channels // 2
        tiles = math.ceil(positions / TILE_POSITIONS)
        whole_images = 2 * images * math.ceil(features / TILE_FEATURES)
        tiles_per_part = math.ceil(tiles / max(1, _PROGRAMS // whole_images))
        parts = math.ceil(tiles / tiles_per_part)
        return cls(images, positions, features, parts, tiles_per_part)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.N, self.P, self.F, self.parts, self.tiles

    @property
    def programs(self) -> int:
        """Count them for one stream."""
        return self.N * self.parts * math.ceil(self.F / TILE_FEATURES)


def _summed(
    partial: Tensor,  # [parts, K, N, C]
) -> Tensor:  # [K, N, C]
    return partial[0] if len(partial) == 1 else partial.sum(0)


# --- on the device -------------------------------------------------------------------------------
#
# A ReLU is shut where z <= 0, which NaN is not, as in PyTorch. All four kernels compute z by the
# same operations, so that they agree on it.


@triton.jit
def _one_stream(F, parts):
    """Return image, part, features and channels of a program that works on one stream.

    The two streams of some features follow each other: the gradient they share is then read from
    the cache the second time.
    """
    program = tl.program_id(0)
    columns = 2 * tl.cdiv(F, _TILE_F)
    column = program % columns
    row = program // columns
    feature = column // 2 * _TILE_F + tl.arange(0, _TILE_F)
    return row // parts, row % parts, feature, column % 2 * F + feature


@triton.jit
def _load_norm(mean, variance, weight, bias, channel, inside, epsilon):
    """Return rows [1, TILE_F] of mean, 1 / deviation, slope and shift."""
    centre = tl.load(mean + channel, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.load(variance + channel, inside, 0.0).to(tl.float32) + epsilon)
    slope = tl.load(weight + channel, inside, 0.0).to(tl.float32) * inverse
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    return centre[None, :], inverse[None, :], slope[None, :], shift[None, :]


@triton.jit
def _load_row(matrix, row, C, channel, inside):
    """Return [1, TILE_F] of a matrix [rows, C]."""
    return tl.load(matrix + row * C + channel, inside, 0.0).to(tl.float32)[None, :]


@triton.jit
def _image(tensor, image, P, C):
    """Return where an image of [N, P, C] begins, which large batches have beyond 2^31."""
    return tensor + image.to(tl.int64) * P * C


@triton.jit
def _positions(part, tiles, tile):
    """Return [TILE_P, 1] positions of a tile in a part of an image."""
    return ((part * tiles + tile) * _TILE_P + tl.arange(0, _TILE_P))[:, None]


@triton.jit
def _pool(
    inputs, mean, variance, weight, bias, sums, N, P, F, parts, tiles, epsilon
):  # sums [parts, 3, N, C]: of the stream, and where it is open of 1 and of yhat
    image, part, feature, channel = _one_stream(F, parts)
    inside = feature < F
    centre, inverse, slope, shift = _load_norm(
        mean, variance, weight, bias, channel, inside, epsilon
    )
    own = _image(inputs, image, P, 2 * F)
    total = tl.zeros([_TILE_P, _TILE_F], tl.float32)
    opened = tl.zeros([_TILE_P, _TILE_F], tl.float32)
    normal = tl.zeros([_TILE_P, _TILE_F], tl.float32)
    for tile in tl.range(tiles, num_stages=_STAGES):
        position = _positions(part, tiles, tile)
        here = (position < P) & inside[None, :]
        value = tl.load(own + position * (2 * F) + channel[None, :], here, 0.0).to(tl.float32)
        centred = value - centre
        z = centred * slope + shift
        shut = (z <= 0) | (position >= P)
        total += tl.where(shut, 0.0, z)
        opened += tl.where(shut, 0.0, 1.0)
        normal += tl.where(shut, 0.0, centred)
    matrix = N * 2 * F
    row = sums + part * 3 * matrix + image * 2 * F + channel
    tl.store(row, tl.sum(total, 0), inside)
    tl.store(row + matrix, tl.sum(opened, 0), inside)
    tl.store(row + 2 * matrix, tl.sum(normal * inverse, 0), inside)


@triton.jit
def _mix(inputs, mean, variance, weight, bias, chosen, mixed, N, P, F, parts, tiles, epsilon):
    program = tl.program_id(0)
    columns = tl.cdiv(F, _TILE_F)
    row = program // columns
    # The last images first: `_pool` read them last, and the cache may hold them still.
    image, part = N - 1 - row // parts, row % parts
    first = program % columns * _TILE_F + tl.arange(0, _TILE_F)
    inside = first < F
    centre_1, _, slope_1, shift_1 = _load_norm(mean, variance, weight, bias, first, inside, epsilon)
    centre_2, _, slope_2, shift_2 = _load_norm(
        mean, variance, weight, bias, F + first, inside, epsilon
    )
    weight_1 = _load_row(chosen, image, 2 * F, first, inside)
    weight_2 = _load_row(chosen, image, 2 * F, F + first, inside)
    own = _image(inputs, image, P, 2 * F)
    result = _image(mixed, image, P, F)
    for tile in tl.range(tiles, num_stages=_STAGES):
        position = _positions(part, tiles, tile)
        here = (position < P) & inside[None, :]
        place = position * (2 * F) + first[None, :]
        z_1 = (tl.load(own + place, here, 0.0).to(tl.float32) - centre_1) * slope_1 + shift_1
        z_2 = (tl.load(own + place + F, here, 0.0).to(tl.float32) - centre_2) * slope_2 + shift_2
        both = tl.where(z_1 <= 0, 0.0, z_1) * weight_1 + tl.where(z_2 <= 0, 0.0, z_2) * weight_2
        tl.store(result + position * F + first[None, :], both, here)


@triton.jit
def _mix_backward(
    inputs, mean, variance, weight, bias, gradient, sums, N, P, F, parts, tiles, epsilon
):  # sums [parts, 2, N, C]: where the stream is open, of g and of g yhat
    image, part, feature, channel = _one_stream(F, parts)
    inside = feature < F
    centre, inverse, slope, shift = _load_norm(
        mean, variance, weight, bias, channel, inside, epsilon
    )
    own = _image(inputs, image, P, 2 * F)
    of_mixed = _image(gradient, image, P, F)
    total = tl.zeros([_TILE_P, _TILE_F], tl.float32)
    normal = tl.zeros([_TILE_P, _TILE_F], tl.float32)
    for tile in tl.range(tiles, num_stages=_STAGES):
        position = _positions(part, tiles, tile)
        here = (position < P) & inside[None, :]
        value = tl.load(own + position * (2 * F) + channel[None, :], here, 0.0).to(tl.float32)
        g = tl.load(of_mixed + position * F + feature[None, :], here, 0.0).to(tl.float32)
        centred = value - centre
        g = tl.where(centred * slope + shift <= 0, 0.0, g)
        total += g
        normal += g * centred
    matrix = N * 2 * F
    row = sums + part * 2 * matrix + image * 2 * F + channel
    tl.store(row, tl.sum(total, 0), inside)
    tl.store(row + matrix, tl.sum(normal * inverse, 0), inside)


@triton.jit
def _pool_backward(
    inputs,
    mean,
    variance,
    weight,
    bias,
    gradient,
    chosen,
    everywhere,  # [N, C] d of every position
    sums,  # [2, C] over all ranks, of dz and of dz yhat
    share,  # of one value in a mean over all ranks
    toward,
    N,
    P,
    F,
    parts,
    tiles,
    epsilon,
):
    image, part, feature, channel = _one_stream(F, parts)
    image = N - 1 - image  # as in `_mix`
    inside = feature < F
    centre, inverse, slope, shift = _load_norm(
        mean, variance, weight, bias, channel, inside, epsilon
    )
    weighted = _load_row(chosen, image, 2 * F, channel, inside)
    added = _load_row(everywhere, image, 2 * F, channel, inside)
    average = _load_row(sums, 0, 2 * F, channel, inside) * share
    tilt = _load_row(sums, 1, 2 * F, channel, inside) * share * inverse
    own = _image(inputs, image, P, 2 * F)
    of_mixed = _image(gradient, image, P, F)
    result = _image(toward, image, P, 2 * F)
    for tile in tl.range(tiles, num_stages=_STAGES):
        position = _positions(part, tiles, tile)
        here = (position < P) & inside[None, :]
        place = position * (2 * F) + channel[None, :]
        g = tl.load(of_mixed + position * F + feature[None, :], here, 0.0).to(tl.float32)
        centred = tl.load(own + place, here, 0.0).to(tl.float32) - centre
        dz = tl.where(centred * slope + shift <= 0, 0.0, g * weighted + added)
        tl.store(result + place, (dz - average - centred * tilt) * slope, here)
