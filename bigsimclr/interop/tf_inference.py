"""Tell a network's architecture from the names and shapes of its official variables."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import mode
from typing import Final, Literal

import torch

from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.interop.tf_names import Naming, names_in, official_shape
from bigsimclr.interop.tf_variables import OfficialVariables
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.anatomy import DEPTHS, EXPANSION, GROUP_WIDTHS
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone

_Depth = Literal[10, 18, 34, 50, 101, 152, 200]
_Stem = Literal["imagenet", "cifar"]

_DEPTHS: Final[tuple[_Depth, ...]] = (10, 18, 34, 50, 101, 152, 200)
_STEMS: Final[tuple[_Stem, ...]] = ("imagenet", "cifar")
_STEM_CHANNELS: Final = range(2, 4097)  # the widest official network has 256
_OUTPUTS: Final = range(1, 1 << 24)  # of a projection head or a classifier
_MOST_LAYERS: Final = 16  # of a head that is recognised
_MOST_PARTS: Final = 4096  # widths are fractions; the largest denominator


def infer_architecture(
    variables: OfficialVariables, from_layer: int | None, recorded: int | None
) -> Architecture:
    """Return the architecture that the variables resemble most, whether or not they all fit it.

    In TF1's naming two networks have the same variables, basic blocks behind the cifar stem with
    and without the pooled shortcut that comes with selective kernels: they count as without.

    What the classifier reads is not among the variables, and may not be recorded at all. Then,
    where a TF2 optimizer moved the classifier and only the first layers of the head, it is the last
    of these: gradients reach all that the classifier reads through. Else it is the first layer of a
    head of three layers or more, as in SimCLRv2 fine-tuned on few labels, and the features with a
    smaller head or none.

    Args:
        variables: what the checkpoint holds.
        from_layer: what the classifier reads: 0 features, k output of the head's layer k; None: as
            recorded, or described above.
        recorded: what the graph beside the checkpoint says that it reads; None: nothing.

    Raises:
        CheckpointError: there is nothing of a ResNet, or something of impossible size.
        RecipeError: `from_layer` contradicts the shapes.

    Source: SimCLRv2 (arXiv:2006.10029) 3 and appendix A; google-research/simclr run.py
        ft_proj_selector.
    """
    outline = _closest_outline(variables)
    backbone = _with_width(variables, outline)
    names, prefix = outline.names, variables.bundle.prefix
    head = _infer_head(variables, names)
    classes = _outputs(variables, names, "classifier.")
    if classes is None:
        if from_layer is not None:
            raise RecipeError(f"{prefix} has no classifier: leave out from_layer {from_layer}")
        return Architecture(backbone, head, None, from_layer=0)
    widths = _widths(backbone, head)
    kernel = variables.shape(names["classifier.weight"])
    fitting = [k for k, width in enumerate(widths) if kernel is None or kernel[:1] == (width,)]
    if from_layer is None:
        likely = _layer_by_momentum(variables, names, len(widths) - 1)
        likely = likely if recorded is None else recorded
        from_layer = likely if likely in fitting else min(fitting, default=0)
    elif not 0 <= from_layer < len(widths):
        raise RecipeError(
            f"from_layer {from_layer}: the head in {prefix} has {len(widths) - 1} layers"
        )
    elif fitting and from_layer not in fitting:
        raise RecipeError(
            f"from_layer {from_layer}: its width is {widths[from_layer]}, but the classifier in "
            f"{prefix} reads {kernel and kernel[0]} values"
        )
    return Architecture(backbone, head, classes, from_layer)


@dataclass(frozen=True)
class _Outline:
    """A network of any width, with the longest head and a classifier."""

    section: ResNetBackbone  # of width 1
    names: Mapping[str, str]  # our name -> official name
    kernels: Mapping[str, tuple[int, ...]]  # of the backbone: official name -> height and width


@cache
def _outline(naming: Naming, depth: _Depth, stem: _Stem, selective_kernel: bool) -> _Outline:  # noqa: FBT001 - a key of the cache
    section = ResNetBackbone(depth=depth, stem=stem, selective_kernel=selective_kernel)
    head = HeadSection(layers=_MOST_LAYERS + 1)
    with torch.device("meta"):
        model = build_model(Architecture(section, head, classes=1, from_layer=0), seed=0)
    names = names_in(naming, model)
    state = model.backbone.state_dict(prefix="backbone.")
    kernels = {names[ours]: official_shape(tensor)[:-2] for ours, tensor in state.items()}
    return _Outline(section, names, kernels)


def _closest_outline(variables: OfficialVariables) -> _Outline:
    """Return the network of whose backbone most is there, and least is missing."""

    def surplus(outline: _Outline) -> int:
        shapes = ((variables.shape(name), size) for name, size in outline.kernels.items())
        return sum(1 if shape is not None and shape[:-2] == size else -1 for shape, size in shapes)

    # Of equals the first: without selective kernels, and the smallest.
    closest = max(
        (
            _outline(variables.naming, depth, stem, selective_kernel)
            for selective_kernel, stem, depth in product((False, True), _STEMS, _DEPTHS)
        ),
        key=surplus,
    )
    if surplus(closest) == -len(closest.kernels):
        raise CheckpointError(
            f"{variables.bundle.prefix} holds no network of the SimCLR code: "
            f"{next(iter(closest.kernels))!r} is missing, and all that follow it"
        )
    return closest


def _with_width(variables: OfficialVariables, outline: _Outline) -> ResNetBackbone:
    """Return the backbone with the simplest width that gives the channels of all four groups."""
    plan = DEPTHS[outline.section.depth]
    last_norm, expansion = ("bn3", EXPANSION) if plan.bottleneck else ("bn2", 1)
    channels: list[tuple[int, int]] = []  # of a group at width 1, and here
    for group, (blocks, whole) in enumerate(zip(plan.blocks, GROUP_WIDTHS, strict=True), start=1):
        place = f"backbone.layer{group}.{blocks - 1}.{last_norm}."
        outputs = _outputs(variables, outline.names, place)
        if outputs is not None:
            channels.append((whole, outputs // expansion))
    if not channels:
        raise CheckpointError(
            f"{variables.bundle.prefix} lacks the last batch norm of each of the four groups"
        )
    # A damaged checkpoint may have no such width: the one of most groups names what is wrong.
    width = mode(have / whole for whole, have in channels)
    whole, have = channels[-1]
    for parts in range(1, _MOST_PARTS + 1):
        simple = round(have * parts / whole) / parts
        if all(round(channel * simple) == found for channel, found in channels):
            width = simple
            break
    if round(GROUP_WIDTHS[0] * width) not in _STEM_CHANNELS:
        raise CheckpointError(f"{variables.bundle.prefix} has a network of impossible width")
    return outline.section.model_copy(update={"width": width})


def _infer_head(variables: OfficialVariables, names: Mapping[str, str]) -> HeadSection | None:
    outputs = {
        index + 1: found
        for index in range(_MOST_LAYERS)
        if (found := _outputs(variables, names, f"head.layers.{index}.")) is not None
    }
    if not outputs:
        return None
    layers = max(outputs)
    if variables.key(names[f"head.layers.{layers - 1}.bn.bias"]) is not None:
        return HeadSection(layers=layers + 1)  # only the last layer is without: it is missing
    return HeadSection(layers=layers, output_width=outputs[layers])


def _widths(backbone: ResNetBackbone, head: HeadSection | None) -> tuple[int, ...]:
    """Return the widths of all that a classifier can read: features, then the head's layers."""
    features = round(GROUP_WIDTHS[-1] * backbone.width)
    if DEPTHS[backbone.depth].bottleneck:
        features *= EXPANSION
    if head is None:
        return (features,)
    return (*[features] * head.layers, head.output_width)


def _layer_by_momentum(variables: OfficialVariables, names: Mapping[str, str], layers: int) -> int:
    """Return what the classifier reads, going by momenta; without them, what is usual."""
    scales = [names[f"head.layers.{index}.bn.weight"] for index in range(layers)]
    moved = [variables.has_momentum(name) for name in scales]
    if variables.has_momentum(names["classifier.weight"]) and not all(moved):
        return moved.index(False)
    return 1 if layers >= 3 else 0


def _outputs(variables: OfficialVariables, names: Mapping[str, str], start: str) -> int | None:
    """Return the last dimension of the variables whose name in our network starts so.

    Of most of them, if they differ; None if there are none.

    Raises:
        CheckpointError: it is no possible width.
    """
    shapes = {
        theirs: variables.shape(theirs) for ours, theirs in names.items() if ours.startswith(start)
    }
    found = {name: shape[-1] for name, shape in shapes.items() if shape}
    if not found:
        return None
    width = mode(found.values())
    if width not in _OUTPUTS:
        raise CheckpointError(
            f"{variables.bundle.prefix}: {min(found)!r} has the impossible width {width}"
        )
    return width
