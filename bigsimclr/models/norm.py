"""Batch norm with the official running variance, over the images of one rank or of all.

Shapes: N images of this rank, C channels, H x W positions, W ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from typing_extensions import override

from bigsimclr.world import ALONE, World

EPSILON: Final = 1e-5
MOMENTUM: Final = 0.1
"""Weight of the new batch in the running statistics: one minus the official decay of 0.9."""


@dataclass
class Note:
    """What one forward pass of a batch norm did, for when the backward pass makes it again."""

    written: bool = False
    moved: bool = False  # the running statistics
    statistics: tuple[Tensor, Tensor] | None = None  # [C], [C]; None: PyTorch takes them again


class BatchNorm(nn.Module):
    """Normalise each channel over the batch, and keep running statistics for evaluation.

    As `torch.nn.BatchNorm2d`, but the running variance takes the *biased* batch variance, which
    divides by the number of values n. PyTorch divides by n - 1 there, which at n = 2 doubles it.

    After `share_batch_norm` the statistics are those of all ranks' images: exactly the variance of
    the whole, and exactly its gradient. Unlike `torch.nn.SyncBatchNorm`, also on a CPU.

    After `fuse_batch_norm` a training pass over 16 or 32 bits in channels_last is one of fused
    kernels; every other pass, that of evaluation mode included, stays with PyTorch.

    Source: google-research/simclr resnet.py BatchNormRelu (fused=False) and cross_replica_average,
        tf2/resnet.py.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, has_bias: bool = True, zero_scale: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.moves_running_statistics = True
        self.world = ALONE
        self.fused = False
        self.note: Note | None = None  # an empty one is written to, a written one obeyed
        scale = torch.zeros(channels) if zero_scale else torch.ones(channels)
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(torch.zeros(channels)) if has_bias else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, C] or [N, C, H, W], any memory format
        residual: Tensor | None = None,  # [N, C] or [N, C, H, W]
        *,
        relu: bool = False,
    ) -> Tensor:  # as inputs
        """Normalise with the batch's statistics in training mode, else with the running ones.

        Args:
            inputs: what to normalise.
            residual: added to the result.
            relu: then cut at zero.

        Raises:
            ValueError: training mode with a single value per channel, which has no variance.
        """
        is_again = self.note is not None and self.note.written
        if self.fused and (self.training or is_again) and _suits_kernels(inputs):
            return self._fuse(inputs, residual, relu=relu)
        outputs = self._normalise(inputs)
        if residual is not None:
            outputs = outputs.add_(residual)
        return F.relu(outputs, inplace=True) if relu else outputs

    def _normalise(self, inputs: Tensor) -> Tensor:
        if self.note is not None and self.note.written:
            return self._again(inputs, self.note)
        if not self.training:
            return F.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON
            )
        if self.world.size > 1:
            return self._over_all_ranks(inputs, *self._join(*_own_statistics(inputs)))
        if self.note is not None:
            self.note.written, self.note.moved = True, self.moves_running_statistics
        if not self.moves_running_statistics:
            return F.batch_norm(
                inputs, None, None, self.weight, self.bias, training=True, eps=EPSILON
            )
        # The kernel moves running_mean itself. The variance goes through a scratch tensor: it
        # comes out as MOMENTUM x unbiased variance, and the buffer that autograd saved for the
        # backward pass must not be changed in place after it.
        scratch = torch.zeros_like(self.running_var)
        outputs = F.batch_norm(
            inputs,
            self.running_mean,
            scratch,
            self.weight,
            self.bias,
            training=True,
            momentum=MOMENTUM,
            eps=EPSILON,
        )
        values = inputs.numel() // self.channels
        with torch.no_grad():
            self.running_var.mul_(1 - MOMENTUM).add_(scratch, alpha=(values - 1) / values)
        return outputs

    def _fuse(self, inputs: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        from bigsimclr.kernels.norm_act import norm_act

        mean, variance = self.training_statistics(inputs)
        return norm_act(
            inputs,
            mean,
            variance,
            self.weight,
            self.bias,
            residual,
            epsilon=EPSILON,
            relu=relu,
            ranks=self.world.size,
            total=self.world.total if self.world.size > 1 else None,
        )

    @torch.no_grad()
    def _join(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Join the ranks' statistics, note them, and move the running ones."""
        mean, variance = _over_ranks(mean, variance, self.world)
        if self.moves_running_statistics:
            # One launch on a GPU.
            torch._foreach_lerp_(
                [self.running_mean, self.running_var],
                [mean.to(self.running_mean.dtype), variance.to(self.running_var.dtype)],
                MOMENTUM,
            )
        return self._noted(mean, variance)

    def _noted(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        if self.note is not None:
            self.note.written, self.note.statistics = True, (mean, variance)
        return mean, variance

    def _over_all_ranks(self, inputs: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        outputs: Tensor = _GlobalNorm.apply(  # type: ignore[no-untyped-call]
            inputs, mean, variance, self.weight, self.bias, self.world
        )
        return outputs

    def _again(self, inputs: Tensor, note: Note) -> Tensor:
        """Repeat a training forward pass: no collective, and nothing moves."""
        if note.statistics is not None:
            return self._over_all_ranks(inputs, *note.statistics)
        # Autograd must be given as many tensors to keep as in the first pass.
        mean = torch.zeros_like(self.running_mean) if note.moved else None
        variance = torch.zeros_like(self.running_var) if note.moved else None
        return F.batch_norm(
            inputs, mean, variance, self.weight, self.bias, training=True, eps=EPSILON
        )

    def training_statistics(
        self,
        inputs: Tensor,  # [N, C], or [N, C, H, W] in channels_last; of 32 or 16 bits
    ) -> tuple[Tensor, Tensor]:  # [C], [C] float32: mean and biased variance over all ranks
        """Do what a training forward pass does before it normalises, for kernels that then do so.

        Moves the running statistics; a pass made again does not, and returns those of the first.

        Args:
            inputs: what will be normalised.

        Raises:
            ValueError: a single value per channel, which has no variance.
        """
        from bigsimclr.kernels.norm_statistics import batch_statistics

        if self.note is not None and self.note.statistics is not None:
            return self.note.statistics
        if inputs.numel() * self.world.size == self.channels:
            raise ValueError(
                f"batch norm needs more than 1 value per channel, got {list(inputs.shape)}"
            )
        running = self.running_mean, self.running_var
        if self.world.size > 1 or running[0].dtype != torch.float32:
            return self._join(*batch_statistics(inputs))
        if not self.moves_running_statistics:
            return self._noted(*batch_statistics(inputs))
        return self._noted(*batch_statistics(inputs, running=running, momentum=MOMENTUM))

    @override
    def extra_repr(self) -> str:
        return f"{self.channels}, has_bias={self.bias is not None}"


def share_batch_norm(model: nn.Module, world: World) -> None:
    """Let every `BatchNorm` in `model` take its statistics over the images of all ranks.

    In training mode every rank must then make every forward and backward pass, with as many images.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.world = world


def fuse_batch_norm(model: nn.Module) -> None:
    """Let every `BatchNorm` in `model` use the fused kernels where it can.

    Names and values of parameters do not change; results do, by rounding errors.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.fused = True


def shared_batch_norms(model: nn.Module) -> dict[BatchNorm, World]:
    """Return every `BatchNorm` in `model` with the ranks that share its statistics."""
    return {module: module.world for module in model.modules() if isinstance(module, BatchNorm)}


@torch.no_grad()
def average_running_statistics(model: nn.Module, world: World) -> None:
    """Give all ranks one set of running statistics, where groups of them have their own.

    Running statistics are averages over time; the mean over groups is that of all their batches.
    Those of a frozen batch norm, in evaluation mode, are alike already.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.training and module.world.size < world.size:
            for statistics in (module.running_mean, module.running_var):
                statistics.copy_(world.total(statistics) / world.size)


@torch.no_grad()
def _own_statistics(
    inputs: Tensor,  # [N, C] or [N, C, H, W]
) -> tuple[Tensor, Tensor]:  # [C], [C]: mean and variance of one rank, float32 or float64
    precise = inputs if inputs.dtype == torch.float64 else inputs.float()
    variance, mean = torch.var_mean(precise, _all_but_channels(inputs), correction=0)
    return mean, variance


def _over_ranks(
    mean: Tensor,  # [C] of one rank
    variance: Tensor,  # [C]
    world: World,
) -> tuple[Tensor, Tensor]:  # [C], [C]
    if world.size == 1:
        return mean, variance
    # The variance of the whole is the mean of the parts' variances, and that of their means. Sums
    # of squares would be one collective too, and lose half the digits.
    variances, means = world.gather(torch.stack([variance, mean])).unbind(1)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def _suits_kernels(inputs: Tensor) -> bool:
    from bigsimclr.kernels.norm_statistics import suits

    return suits(inputs)


class _GlobalNorm(Function):
    """Normalise by statistics of all ranks, and let gradients flow through them."""

    @staticmethod
    @override
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        world: World,
    ) -> Tensor:
        ctx.save_for_backward(inputs, mean, variance, weight)
        ctx.world, ctx.has_bias = world, bias is not None  # type: ignore[attr-defined]
        return F.batch_norm(inputs, mean, variance, weight, bias, eps=EPSILON)

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, variance, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        world: World = ctx.world  # type: ignore[attr-defined]
        dimensions = _all_but_channels(inputs)
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        inverse = (variance + EPSILON).rsqrt()
        normal = (inputs.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        upstream = gradient.to(mean.dtype)
        sums = torch.stack([upstream.sum(dimensions), (upstream * normal).sum(dimensions)])
        values = inputs.numel() // len(mean) * world.size
        average, slope = (world.total(sums) / values).unbind(0)
        through = upstream - average.view(shape) - normal * slope.view(shape)
        toward = through * (weight * inverse).view(shape)
        own_bias, own_weight = sums.to(weight.dtype).unbind(0)
        has_bias: bool = ctx.has_bias  # type: ignore[attr-defined]
        return toward.to(inputs.dtype), None, None, own_weight, own_bias if has_bias else None, None


def _all_but_channels(inputs: Tensor) -> list[int]:
    return [0, *range(2, inputs.ndim)]


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Let every `BatchNorm` in `model` use batch statistics without moving the running ones.

    For forward passes that are repeated, so that each image counts once.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.moves_running_statistics
    ]
    for norm in norms:
        norm.moves_running_statistics = False
    try:
        yield
    finally:
        for norm in norms:
            norm.moves_running_statistics = True
