"""What a training step of a network reads, writes and computes, kernel by kernel.

The network is our own, passed forward once on the meta device. Of each of its layers the kernels
of a training step are listed, in four tiers of fusion. A kernel reads or writes whole activations;
how often, is derived here. n values pass a layer; t are those of one stream of a selective kernel.

*Convolutions*, dense layers included, x in, y out, w weights: forward x + w + y, data gradient
y + w + x (the first layer has none), weight gradient x + y + w. In the tier "ideal" one kernel
makes both gradients and reads dz, y, x and w once each: dz, since batch norm's backward pass is
applied to it on the way in, which takes y beside it.

*Batch norm and ReLU*, passes over n, forward + backward:

eager       batch norm reads for its statistics, reads, writes (3); backward it reads x and the
            gradient for two sums, reads both again, writes (5). ReLU 2 + 3.
fused_elementwise   3 + 5: ReLU comes with the writing, and its mask is made again from x.
epilogue    2 + 5: the convolution makes the statistics where it writes.
ideal       0 + 0: applied where the next convolution reads; the backward sums are made where that
            convolution writes its data gradient, having read x for its weight gradient.

*The end of a block*, its last batch norm, the sum with the shortcut and ReLU:

eager       3 + 5, the sum 3, ReLU 2 + 3.
fused_elementwise   4 + 6: the shortcut is read beside; backward the masked gradient is written, as
            the shortcut's branch needs it too. The mask itself is kept in bits, and not counted.
epilogue    3 + 6, and the shortcut's own batch norm is applied where the shortcut is read: 0 + 5.
ideal       3 + 1: two branches read the result, so that it is written; backward only what the sums
            need is read beside, also for a batch norm in the shortcut, 0 + 1.

Where a block begins two gradients meet, of its two branches: a kernel of its own reads both and
writes their sum, 3 passes over the block's input; "ideal" reads one where it writes the other, 1,
as `models.fork` does on a GPU, which is in no other tier.

*Selective kernels*, with the batch norm and ReLU over both streams:

eager       that is 2 (5 + 8) t; then the mean reads 2, two products read and write 2 + 2, their sum
            3: 9 t. Backward each product's two gradients take 2 and 3 and a sum 1, twice: 12 t;
            the streams' gradients are put together, 4; the mean's is spread, 2, and added, 6: 24 t.
fused_elementwise   statistics 2, mean 2, mixing 2 + 1; backward, with g the gradient of the mix,
            the weights' gradient reads g and both streams, 3, so do batch norm's sums, 3, and
            the last pass, which writes both, 5: 7 + 11 t.
epilogue    5 + 8 t: no pass for statistics, and the sums come with the weights' gradient, since
            the gradient is g times a weight plus a constant, both alike for all positions.
ideal       5 + 2 t: the last pass is the convolution's way in, where g stands for dz.

*Pools* read and write what goes in and out, both ways. The max-pool keeps where each maximum was,
eager in an int64, else in a byte. The mean at the end reads, and spreads its gradient.

Left out: the image's augmentation and cast, casts of weights, the loss, the optimizer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.heads import HeadLayer
from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.resnet import BasicBlock, Bottleneck, SameMaxPool, ShortcutPool
from bigsimclr.models.selective import SelectiveKernel

Tier = Literal["eager", "fused_elementwise", "epilogue", "ideal"]
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)
Role = Literal["relu", "bare", "shortcut", "end", "streams"]
"""What follows a batch norm: ReLU, nothing, a sum as its shortcut, a sum and ReLU, a mixing."""

# Forward and backward passes of a batch norm with what follows it, by tier. Those of "streams" are
# over one of the two streams; a sum's are counted with the last batch norm, at the end of a block.
_PASSES: Final[dict[Role, tuple[int, int, int, int]]] = {
    "relu": (3 + 2 + 5 + 3, 3 + 5, 2 + 5, 0),
    "bare": (3 + 5, 3 + 5, 2 + 5, 0),
    "shortcut": (3 + 5, 3 + 5, 0 + 5, 0 + 1),
    "end": (3 + 3 + 2 + 5 + 3, 4 + 6, 3 + 6, 3 + 1),
    "streams": (2 * (5 + 8) + 9 + 24, 7 + 11, 5 + 8, 5 + 2),
}
_MEETING_PASSES: Final = (3, 3, 3, 1)
_INDEX_BYTES: Final = (8, 1, 1, 1)


@dataclass(frozen=True)
class Layer:
    """One layer, by what passes it for one view."""

    kind: Literal["convolution", "norm", "meeting", "max_pool", "pool", "mean"]
    inputs: int  # values
    outputs: int  # values
    weights: int = 0
    flops: int = 0  # of the forward pass
    is_first: bool = False  # its input takes no gradient
    role: Role = "relu"


@dataclass(frozen=True)
class Kernel:
    """One kernel of a training step."""

    flops: int  # for one view
    activation_bytes: int  # read and written, for one view
    weight_bytes: int = 0  # read and written, once for all views

    def bytes_per_view(self, views: int) -> float:
        """Return the bytes that one of several views moves."""
        return self.activation_bytes + self.weight_bytes / views


def layers(architecture: Architecture, image_size: int) -> list[Layer]:
    """Pass an empty view through the network and note its layers in their order."""
    with torch.device("meta"):
        model = build_model(architecture, seed=0)
        images = torch.empty(2, 3, image_size, image_size)  # a variance takes two
    roles = _roles(model)
    found: list[Layer] = []

    def note(module: nn.Module, taken: tuple[Tensor, ...], made: object) -> None:
        inputs = math.prod(taken[0].shape[1:])
        outputs = math.prod(made.shape[1:]) if isinstance(made, Tensor) else 0
        match module:
            case nn.Conv2d() | nn.Linear():
                weights = module.weight.numel()
                assert isinstance(made, Tensor)
                flops = 2 * weights * math.prod(made.shape[2:])
                is_first = taken[0] is images
                found.append(Layer("convolution", inputs, outputs, weights, flops, is_first))
            case BatchNorm():
                found.append(Layer("norm", inputs, outputs, role=roles[module]))
            case BasicBlock() | Bottleneck():
                found.append(Layer("meeting", inputs, outputs))
            case SameMaxPool():
                found.append(Layer("max_pool", inputs, outputs))
            case ShortcutPool():
                found.append(Layer("pool", inputs, outputs))
            case _:
                pass

    for module in model.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        model(images)
    last = next(layer for layer in reversed(found) if layer.kind == "meeting")
    found.append(Layer("mean", last.outputs, 0))
    return found


def _roles(model: nn.Module) -> dict[BatchNorm, Role]:
    """Say what follows each batch norm."""
    roles: dict[BatchNorm, Role] = {m: "relu" for m in model.modules() if isinstance(m, BatchNorm)}
    for module in model.modules():
        match module:
            case BasicBlock():
                roles[module.bn2] = "end"
            case Bottleneck():
                roles[module.bn3] = "end"
            case SelectiveKernel():
                roles[module.bn] = "streams"
            case HeadLayer() if module.is_last:
                roles[module.bn] = "bare"
            case _:
                pass
        if isinstance(module, BasicBlock | Bottleneck) and module.downsample is not None:
            norm = module.downsample[-1]
            assert isinstance(norm, BatchNorm)
            roles[norm] = "shortcut"
    return roles


def kernels(found: list[Layer], tier: Tier, *, value_bytes: int) -> list[Kernel]:
    """List the kernels of a training step whose activations and weights have so many bytes."""
    return [kernel for layer in found for kernel in _kernels(layer, tier, value_bytes)]


def forward_flops(found: list[Layer]) -> int:
    """Return the FLOPs of a forward pass of one view."""
    return sum(layer.flops for layer in found)


def _kernels(layer: Layer, tier: Tier, value_bytes: int) -> Iterator[Kernel]:
    number = TIERS.index(tier)
    inputs, outputs = layer.inputs * value_bytes, layer.outputs * value_bytes
    match layer.kind:
        case "convolution":
            yield from _convolution(layer, inputs, outputs, tier, value_bytes)
        case "norm" if layer.role == "streams":
            yield Kernel(0, _PASSES["streams"][number] * outputs // 2)
        case "norm":
            yield Kernel(0, _PASSES[layer.role][number] * outputs)
        case "meeting":
            yield Kernel(0, _MEETING_PASSES[number] * inputs)
        case "max_pool":
            yield Kernel(0, 2 * (inputs + outputs + layer.outputs * _INDEX_BYTES[number]))
        case "pool" | "mean":
            yield Kernel(0, 2 * (inputs + outputs))


def _convolution(
    layer: Layer, inputs: int, outputs: int, tier: Tier, value_bytes: int
) -> Iterator[Kernel]:
    weights = layer.weights * value_bytes
    yield Kernel(layer.flops, inputs + outputs, weights)
    gradients = 1 if layer.is_first else 2
    if tier == "ideal":
        yield Kernel(gradients * layer.flops, gradients * inputs + 2 * outputs, gradients * weights)
        return
    for _ in range(gradients):
        yield Kernel(layer.flops, inputs + outputs, weights)
