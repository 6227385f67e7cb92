"""Networks: what a backbone is, and the one place that builds a model from its description.

Shapes: N images, H x W pixels, F = feature width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import ConfigDict, TypeAdapter

from bigsimclr.recipe.sections import HeadSection, ResNetBackbone

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigsimclr.models.resnet import ResNet
    from bigsimclr.models.simclr import SimCLR


class Backbone(Protocol):
    """Anything that encodes images; implementations are `torch.nn.Module`s."""

    feature_width: int  # F

    def __call__(
        self,
        images: "Tensor",  # [N, 3, H, W] in [0, 1]
        /,
    ) -> "Tensor":  # [N, F]
        """Encode images."""
        ...


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a network again, apart from its weights."""

    backbone: ResNetBackbone
    head: HeadSection | None  # the whole head, also where only its first layers are kept
    classes: int | None  # outputs of the classifier; None without one
    from_layer: int  # what the classifier reads: 0 features, k output of the head's layer k
    keep_head_layers: int | None = None  # first layers of the head that exist; None: all

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    def to_json(self) -> str:
        """Write this description as one line of JSON."""
        return TypeAdapter(Architecture).dump_json(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> "Architecture":
        """Read a description that `to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or does not describe a network.
        """
        return TypeAdapter(Architecture).validate_json(text)


def build_model(
    architecture: Architecture,
    *,
    seed: int,  # of the recipe; equal seeds give equal weights
    probe: bool = False,
    zero_classifier: bool = False,
) -> "SimCLR":
    """Build a network with its initial weights, in channels_last memory format, on the CPU.

    Under `torch.device("meta")` it has shapes only, which costs no memory. The backbone's weights
    do not depend on the head, nor the head's first layers on how many are kept.

    Args:
        architecture: What to build.
        seed: Seed of the initial weights.
        probe: No gradient flows from the classifier into the network.
        zero_classifier: Start the classifier at zero, as fine-tuning and linear evaluation do.

    Raises:
        ValueError: the description contradicts itself, as reading a layer that is not kept.
    """
    import torch

    from bigsimclr.models.heads import ProjectionHead, classifier
    from bigsimclr.models.simclr import SimCLR
    from bigsimclr.randomness import weights_seed

    section, kept = architecture.head, architecture.keep_head_layers
    generator = torch.Generator().manual_seed(weights_seed(seed))
    backbone = _build_backbone(architecture.backbone, generator)
    head = None
    if section is not None and kept != 0:
        head = ProjectionHead(
            backbone.feature_width,
            layers=section.layers,
            output_width=section.output_width,
            keep_layers=kept,
            generator=generator,
        )
    widths = (backbone.feature_width, *(head.widths if head is not None else ()))
    if not 0 <= architecture.from_layer < len(widths):
        raise ValueError(
            f"from_layer {architecture.from_layer}: the head has {len(widths) - 1} layers here"
        )
    linear = None
    if architecture.classes is not None:
        linear = classifier(
            widths[architecture.from_layer],
            architecture.classes,
            None if zero_classifier else generator,
        )
    model = SimCLR(
        backbone,
        head,
        classifier=linear,
        from_layer=architecture.from_layer,
        detach_classifier_input=probe,
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs lack it
    return model


def restore_model(
    architecture: Architecture,
    weights: Mapping[str, "Tensor"],  # the whole state: parameters and running statistics
) -> "SimCLR":
    """Build a network around weights that exist, in evaluation mode; nothing is drawn.

    Raises:
        ValueError: the description contradicts itself.
        RuntimeError: weights are missing, extra or misshapen.
    """
    import torch

    with torch.device("meta"):
        model = build_model(architecture, seed=0)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs lack it
    return model.eval()


def _build_backbone(section: ResNetBackbone, generator: "torch.Generator") -> "ResNet":
    from bigsimclr.models.resnet import ResNet

    return ResNet(
        depth=section.depth,
        width=section.width,
        selective_kernel=section.selective_kernel,
        stem=section.stem,
        generator=generator,
    )
