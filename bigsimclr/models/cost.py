"""What a network costs: parameters, arithmetic and memory, from its description alone.

One walk over the layers, in the order of their computation; no network is built and torch is not
imported. All counts are exact for the implementation in this package:

* Parameters are trained numbers; statistics are batch norm's running means and variances.
* FLOPs are those of convolutions and dense layers, two for a multiplication with its addition.
* Activations are what autograd keeps of one view until the backward pass: inputs of convolutions,
  dense layers and batch norms, results of ReLUs, what the pools and selective kernels need, and,
  in 16 bits, the copy of the image. Not counted is what no further view adds to (weights and
  their 16-bit copies, batch statistics), the image itself, and whatever the loss keeps.
* Where stem and blocks are computed again (`models.memory`), they keep their inputs, and with
  `selective` their convolutions' results, but for the last one of a bottleneck. While the backward
  pass is in one of them, all that it would have kept is there again, beside a gradient that comes
  in and one that is made of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from bigsimclr.models import Architecture
from bigsimclr.models.anatomy import (
    DEPTHS,
    EXPANSION,
    GROUP_WIDTHS,
    Memory,
    scaled,
    selective_width,
    stem_width,
)

Precision = Literal["fp32", "bf16", "fp16"]

VALUE_BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2}
_INDEX_BYTES: Final = 8
"""PyTorch's max-pool remembers where each maximum was as an int64; the fused one, in a byte."""
_IMAGE_CHANNELS: Final = 3


@dataclass(frozen=True)
class Part:
    """What some layers cost."""

    parameters: int
    statistics: int  # running means and variances of batch norm
    flops: int  # of a forward pass of one view
    activation_bytes: int  # kept for the backward pass, per view

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.parameters + other.parameters,
            self.statistics + other.statistics,
            self.flops + other.flops,
            self.activation_bytes + other.activation_bytes,
        )


@dataclass(frozen=True)
class Cost:
    """What a network costs, by its parts; a part that it lacks costs nothing."""

    backbone: Part
    head: Part
    classifier: Part
    largest_activation_bytes: int  # of one view, kept or not
    largest_block_parameters: int  # of the residual block that has most
    again_bytes: int  # at most; what computing stem or block again adds to the kept, per view
    again_flops: int  # of what is computed again for one view, in the backward pass

    @property
    def total(self) -> Part:
        """Return the sum of the parts."""
        return self.backbone + self.head + self.classifier


def cost(
    architecture: Architecture,
    *,
    image_size: int,  # pixels of the square input's side
    precision: Precision = "fp32",
    frozen: bool = False,
    memory: Memory = "none",
) -> Cost:
    """Count what a network costs.

    Args:
        architecture: the network.
        image_size: pixels of the square input's side.
        precision: of its arithmetic; parameters stay float32.
        frozen: only the classifier is trained, so that nothing else keeps activations.
        memory: what is computed again in the backward pass instead of kept.

    Raises:
        ValueError: the description contradicts itself, as in `build_model`.
    """
    walk = _Walk(VALUE_BYTES[precision], keeps=not frozen, memory=memory)
    features = _walk_backbone(walk, architecture, image_size, casts=precision != "fp32")
    backbone = walk.take()
    outputs = _walk_head(walk, architecture, features)
    head = walk.take()
    if not 0 <= architecture.from_layer < len(outputs):
        raise ValueError(
            f"from_layer {architecture.from_layer}: the head has {len(outputs) - 1} layers here"
        )
    if architecture.classes is not None:
        read = outputs[architecture.from_layer]
        walk.keeps = True  # it is always trained
        walk.dense(read.width, architecture.classes, kept=read.kept and not frozen, has_bias=True)
    classifier = walk.take()
    kept = sum(part.activation_bytes for part in (backbone, head, classifier))
    return Cost(
        backbone,
        head,
        classifier,
        largest_activation_bytes=walk.largest * walk.value_bytes,
        largest_block_parameters=walk.largest_block,
        again_bytes=max(walk.peak - kept, 0),
        again_flops=walk.again_flops,
    )


@dataclass(frozen=True)
class _Output:
    """What a classifier may read."""

    width: int
    kept: bool  # by another layer that needs it


class _Walk:
    """Sums on the way through the layers."""

    def __init__(self, value_bytes: int, *, keeps: bool, memory: Memory) -> None:
        self.value_bytes = value_bytes
        self.keeps = keeps
        self.largest = 0  # values in any one activation
        self.largest_block = 0  # parameters
        self.peak = 0  # bytes, while a block is computed again
        self.again_flops = 0
        self._memory = memory
        self._parameters = 0
        self._statistics = 0
        self._flops = 0
        self._kept = 0  # bytes
        self._convolved = 0  # bytes that convolutions made
        self._widest = 0  # values in one result of a convolution of this block
        self._last = (0, 0)  # bytes that the last convolution made, and its FLOPs

    def take(self) -> Part:
        """Return the sums since the last call."""
        part = Part(self._parameters, self._statistics, self._flops, self._kept)
        self._parameters = self._statistics = self._flops = self._kept = 0
        return part

    @contextmanager
    def block(
        self, out_values: int, *, is_last: bool = False, repeats_last: bool = False
    ) -> Iterator[None]:
        """Pass the stem or a residual block, whose input is kept in every case.

        Args:
            out_values: in its result, which the next one keeps.
            is_last: nobody keeps it.
            repeats_last: `selective` computes the last convolution again as well.
        """
        kept, convolved, flops = self._kept, self._convolved, self._flops
        parameters = self._parameters
        self._widest = 0
        yield
        self.largest_block = max(self.largest_block, self._parameters - parameters)
        if not self.keeps or self._memory == "none":
            return
        self.peak = max(self.peak, self._kept + 2 * self._widest * self.value_bytes)
        self._kept = kept + (0 if is_last else out_values * self.value_bytes)
        if self._memory == "selective":
            self._kept += self._convolved - convolved
            if repeats_last:
                self._kept -= self._last[0]
                self.again_flops += self._last[1]
        else:
            self.again_flops += self._flops - flops

    def keep(self, values: int, *, bytes_each: int | None = None) -> None:
        """Keep an activation for the backward pass."""
        if self.keeps:
            self._kept += values * (self.value_bytes if bytes_each is None else bytes_each)

    def convolve(self, in_width: int, out_width: int, *, kernel: int = 1, side: int = 1) -> None:
        """Pass a convolution without bias, onto side x side positions."""
        weights = in_width * out_width * kernel * kernel
        self._parameters += weights
        self._flops += 2 * weights * side * side
        self.largest = max(self.largest, out_width * side * side)
        self._widest = max(self._widest, out_width * side * side)
        self._last = (out_width * side * side * self.value_bytes, 2 * weights * side * side)
        self._convolved += self._last[0]

    def dense(self, in_width: int, out_width: int, *, kept: bool, has_bias: bool = False) -> None:
        """Pass a dense layer, whose input may be kept by another layer already."""
        if not kept:
            self.keep(in_width)
        self.convolve(in_width, out_width)
        self._parameters += has_bias * out_width

    def normalise(
        self, width: int, *, side: int = 1, has_bias: bool = True, rectified: bool = True
    ) -> None:
        """Pass a batch norm, which keeps its input, and the ReLU behind it, which its result.

        Where a sum comes between the two, it overwrites the batch norm's result and is kept in
        its stead.
        """
        self._parameters += (1 + has_bias) * width
        self._statistics += 2 * width
        self.keep((1 + rectified) * width * side * side)


def _walk_backbone(walk: _Walk, architecture: Architecture, image_size: int, *, casts: bool) -> int:
    """Return the width of the features."""
    section = architecture.backbone
    plan = DEPTHS[section.depth]
    width, side = stem_width(section.width), image_size
    if section.stem == "imagenet":
        side = _strided(_strided(side, 2), 2)
    with walk.block(width * side * side):
        if casts:
            walk.keep(_IMAGE_CHANNELS * image_size * image_size)
        _walk_stem(walk, section.stem, width, image_size, selective=section.selective_kernel)
    for number, (blocks, channels) in enumerate(zip(plan.blocks, GROUP_WIDTHS, strict=True)):
        inner = scaled(channels, section.width)
        out_width = EXPANSION * inner if plan.bottleneck else inner
        for index in range(blocks):
            stride = 2 if index == 0 and number > 0 else 1
            out_side = _strided(side, stride)
            is_last = number == len(plan.blocks) - 1 and index == blocks - 1
            with walk.block(
                out_width * out_side * out_side, is_last=is_last, repeats_last=plan.bottleneck
            ):
                if index == 0:
                    if section.selective_kernel:
                        _walk_shortcut_pool(walk, width, side, stride)
                    walk.convolve(width, out_width, side=out_side)
                    walk.normalise(out_width, side=out_side, rectified=False)
                if plan.bottleneck:
                    _walk_bottleneck(
                        walk, width, inner, side, out_side, selective=section.selective_kernel
                    )
                else:
                    _walk_basic_block(walk, width, inner, out_side)
            width, side = out_width, out_side
    return width


def _strided(side: int, stride: int) -> int:
    return -(-side // stride)


def _walk_stem(
    walk: _Walk, stem: Literal["imagenet", "cifar"], width: int, image_size: int, *, selective: bool
) -> None:
    if stem == "cifar":
        walk.convolve(_IMAGE_CHANNELS, width, kernel=3, side=image_size)
        walk.normalise(width, side=image_size)
        return
    side = _strided(image_size, 2)
    if selective:
        half = width // 2
        walk.convolve(_IMAGE_CHANNELS, half, kernel=3, side=side)
        walk.normalise(half, side=side)
        walk.convolve(half, half, kernel=3, side=side)
        walk.normalise(half, side=side)
        walk.convolve(half, width, kernel=3, side=side)
    else:
        walk.convolve(_IMAGE_CHANNELS, width, kernel=7, side=side)
    walk.normalise(width, side=side)
    pooled = _strided(side, 2)
    walk.keep(width * pooled * pooled)
    walk.keep(width * pooled * pooled, bytes_each=_INDEX_BYTES)


def _walk_shortcut_pool(walk: _Walk, width: int, side: int, stride: int) -> None:
    if stride == 1:
        # What is kept is a window into a result with one more row and column.
        walk.keep(width * (side + 1) ** 2)
        return
    if side % stride:
        walk.keep(width * (side + 1) ** 2)  # the padded input
    walk.keep(width * _strided(side, stride) ** 2)


def _walk_basic_block(walk: _Walk, in_width: int, width: int, out_side: int) -> None:
    walk.convolve(in_width, width, kernel=3, side=out_side)
    walk.normalise(width, side=out_side)
    walk.convolve(width, width, kernel=3, side=out_side)
    walk.normalise(width, side=out_side)


def _walk_bottleneck(
    walk: _Walk, in_width: int, width: int, side: int, out_side: int, *, selective: bool
) -> None:
    walk.convolve(in_width, width, side=side)
    walk.normalise(width, side=side)
    streams = 2 * width if selective else width
    walk.convolve(width, streams, kernel=3, side=out_side)
    walk.normalise(streams, side=out_side)
    if selective:
        chosen = selective_width(width)
        walk.dense(width, chosen, kept=False)
        walk.normalise(chosen)
        walk.convolve(chosen, streams)
        walk.keep(streams)  # the softmax
        walk.keep(width * out_side * out_side)  # the mixed streams
    walk.convolve(width, EXPANSION * width, side=out_side)
    walk.normalise(EXPANSION * width, side=out_side)


def _walk_head(walk: _Walk, architecture: Architecture, width: int) -> list[_Output]:
    """Return the features and the outputs of the layers that exist."""
    section = architecture.head
    if section is None:
        return [_Output(width, kept=False)]
    keep_layers = architecture.keep_head_layers
    existing = section.layers if keep_layers is None else keep_layers
    outputs = [_Output(width, kept=existing > 0)]
    for index in range(existing):
        is_last = index == section.layers - 1
        out_width = section.output_width if is_last else width
        walk.dense(width, out_width, kept=index > 0)
        walk.normalise(out_width, has_bias=not is_last, rectified=not is_last)
        outputs.append(_Output(out_width, kept=not is_last))
    return outputs
