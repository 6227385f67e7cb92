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
from typing import Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from bigsimclr.kernels import select_passes as passes
from bigsimclr.world import World


@dataclass(frozen=True)
class Tiles:
    """What a program works on at a time, and with what."""

    positions: int
    features: int
    warps: int
    stages: int  # tiles under way, the one at work included
    programs: int  # from which on images are not cut into parts


POOL: Final = Tiles(positions=32, features=64, warps=4, stages=3, programs=2048)
"""Features of 128 bytes in 16 bits, a whole line of the cache. Two tiles of 4 to 8 KB are under way
for each program beside the one at work. An H100 holds 4 or 5 programs per processor: 32 KB and
more, where 3.3 TB/s and 0.7 us of latency want 18. Its 132 processors hold 528 to 660 programs at
once; a few rounds even out their ends."""
MIX: Final = POOL
MIX_BACKWARD: Final = POOL
POOL_BACKWARD: Final = POOL

Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Inputs [N, C, H, W], and mean, variance, weight and bias [C] of their norm."""


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


def sum_streams(
    kept: Kept,
    *,
    epsilon: float,
    tiles: Tiles = POOL,
) -> Tensor:  # [3, N, C] float32
    """Sum a stream over the positions, and where it is open 1 and yhat; no gradient flows."""
    cut = _Cut.of(kept[0], tiles)
    partial = kept[0].new_empty((cut.parts, 3, cut.N, 2 * cut.F), dtype=torch.float32)
    passes.pool[(2 * cut.programs,)](
        *kept, partial, *cut.sizes, epsilon, *cut.sides, num_warps=tiles.warps
    )
    return _summed(partial)


def mix_streams(
    kept: Kept,
    chosen: Tensor,  # [N, C]
    *,
    epsilon: float,
    tiles: Tiles = MIX,
) -> Tensor:  # [N, F, H, W] as inputs
    """Write the weighted sum of both streams; no gradient flows."""
    inputs = kept[0]
    cut = _Cut.of(inputs, tiles)
    mixed = torch.empty(
        (cut.N, cut.F, *inputs.shape[2:]),
        dtype=inputs.dtype,
        device=inputs.device,
        memory_format=torch.channels_last,
    )
    passes.mix[(cut.programs,)](
        *kept, chosen, mixed, *cut.sizes, epsilon, *cut.sides, num_warps=tiles.warps
    )
    return mixed


def sum_gradients(
    kept: Kept,
    gradient: Tensor,  # [N, F, H, W] channels_last, of the mixed streams
    *,
    epsilon: float,
    tiles: Tiles = MIX_BACKWARD,
) -> Tensor:  # [2, N, C] float32
    """Sum g and g yhat over the positions where a stream is open."""
    cut = _Cut.of(kept[0], tiles)
    partial = kept[0].new_empty((cut.parts, 2, cut.N, 2 * cut.F), dtype=torch.float32)
    passes.mix_backward[(2 * cut.programs,)](
        *kept, gradient, partial, *cut.sizes, epsilon, *cut.sides, num_warps=tiles.warps
    )
    return _summed(partial)


def differentiate_inputs(
    kept: Kept,
    gradient: Tensor,  # [N, F, H, W] channels_last, of the mixed streams
    chosen: Tensor,  # [N, C]
    everywhere: Tensor,  # [N, C] d / positions
    totals: Tensor,  # [2, C] over all ranks, of dz and of dz yhat
    *,
    epsilon: float,
    ranks: int,
    tiles: Tiles = POOL_BACKWARD,
) -> Tensor:  # as inputs
    """Write the gradient of the inputs."""
    cut = _Cut.of(kept[0], tiles)
    toward = torch.empty_like(kept[0])
    share = 1 / (cut.N * cut.P * ranks)
    given = gradient, chosen, everywhere, totals, share
    passes.pool_backward[(2 * cut.programs,)](
        *kept, *given, toward, *cut.sizes, epsilon, *cut.sides, num_warps=tiles.warps
    )
    return toward


class _Pool(Function):
    @staticmethod
    @override
    def forward(
        ctx, inputs: Tensor, weight: Tensor, bias: Tensor, norm: Norm, handover: Handover
    ) -> Tensor:
        kept = inputs, norm.mean, norm.variance, weight, bias
        sums = sum_streams(kept, epsilon=norm.epsilon)
        ctx.save_for_backward(*kept, sums[1:])
        ctx.epsilon, ctx.world, ctx.handover = norm.epsilon, norm.world, handover
        return sums[0] / _positions(inputs)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx, pooled_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, opened = ctx.saved_tensors
        inputs, _, _, weight, bias = kept
        gradient, sums, chosen = ctx.handover.take()
        everywhere = pooled_gradient.contiguous() / _positions(inputs)
        # [2, C]: of dz, and of dz yhat.
        own = torch.addcmul(sums * chosen, opened, everywhere).sum(1)
        toward = None
        if ctx.needs_input_grad[0]:
            given = gradient, chosen, everywhere, ctx.world.total(own)
            toward = differentiate_inputs(kept, *given, epsilon=ctx.epsilon, ranks=ctx.world.size)
        own_bias, own_weight = own
        return toward, own_weight.to(weight.dtype), own_bias.to(bias.dtype), None, None


class _Mix(Function):
    @staticmethod
    @override
    def forward(ctx, inputs: Tensor, chosen: Tensor, norm: Norm, handover: Handover) -> Tensor:
        kept = inputs, norm.mean, norm.variance, norm.weight, norm.bias
        mixed = mix_streams(kept, chosen, epsilon=norm.epsilon)
        ctx.save_for_backward(*kept, chosen)
        ctx.epsilon, ctx.handover = norm.epsilon, handover
        return mixed

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *kept, chosen = ctx.saved_tensors
        *_, weight, bias = kept
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums = sum_gradients(kept, gradient, epsilon=ctx.epsilon)
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
    way: Tiles

    @classmethod
    def of(cls, inputs: Tensor, way: Tiles) -> "_Cut":
        images, channels, height, width = inputs.shape
        positions, features = height * width, channels // 2
        tiles = math.ceil(positions / way.positions)
        whole_images = 2 * images * math.ceil(features / way.features)
        tiles_per_part = math.ceil(tiles / max(1, way.programs // whole_images))
        parts = math.ceil(tiles / tiles_per_part)
        return cls(images, positions, features, parts, tiles_per_part, way)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.N, self.P, self.F, self.parts, self.tiles

    @property
    def sides(self) -> tuple[int, int, int]:
        return self.way.positions, self.way.features, self.way.stages

    @property
    def programs(self) -> int:
        """Count them for one stream."""
        return self.N * self.parts * math.ceil(self.F / self.way.features)


def _positions(inputs: Tensor) -> int:
    return inputs.shape[2] * inputs.shape[3]


def _summed(
    partial: Tensor,  # [parts, K, N, C]
) -> Tensor:  # [K, N, C]
    return partial[0] if len(partial) == 1 else partial.sum(0)
