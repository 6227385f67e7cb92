"""The whole network: backbone, projection head, classifier.

Shapes: N images, H x W pixels, F = feature width, K classes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from typing_extensions import override

from bigsimclr.models.norm import BatchNorm

if TYPE_CHECKING:
    from bigsimclr.models.heads import ProjectionHead

ParameterKind = Literal["kernel", "bias", "norm", "classifier_kernel", "classifier_bias"]

_NORMS = (BatchNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)  # noqa: SLF001 - the common base of torch's batch norms has no public name


@dataclass(frozen=True)
class Outputs:
    """What one forward pass yields."""

    features: Tensor  # [N, F] of the backbone
    projections: tuple[Tensor, ...]  # output of each layer of the head; () without a head
    logits: Tensor | None  # [N, K]; None without a classifier


class SimCLR(nn.Module):
    """Backbone, optional projection head, optional classifier on one of their outputs.

    Args:
        backbone: Maps images [N, 3, H, W] to features [N, F].
        head: The projection head.
        classifier: A linear layer on output number `from_layer` of (features, *projections).
        from_layer: 0 for the backbone's features, k for the k-th layer of the head.
        detach_classifier_input: No gradient flows from the classifier into what it reads: a probe
            that watches pretraining without changing it.

    Raises:
        ValueError: the head has fewer than `from_layer` layers.

    Source: google-research/simclr tf2/model.py Model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: "ProjectionHead | None",
        *,
        classifier: nn.Linear | None = None,
        from_layer: int = 0,
        detach_classifier_input: bool = False,
    ) -> None:
        super().__init__()
        layers = 0 if head is None else len(head.layers)
        if not 0 <= from_layer <= layers:
            raise ValueError(f"from_layer {from_layer}: the head has {layers} layers")
        self.backbone = backbone
        self.head = head
        self.classifier = classifier
        self.from_layer = from_layer
        self.detach_classifier_input = detach_classifier_input

    @override
    def forward(
        self,
        images: Tensor,  # [N, 3, H, W] in [0, 1]
    ) -> Outputs:
        """Encode, project and classify images."""
        features: Tensor = self.backbone(images)
        projections: tuple[Tensor, ...] = () if self.head is None else self.head(features)
        logits: Tensor | None = None
        if self.classifier is not None:
            classified = (features, *projections)[self.from_layer]
            if self.detach_classifier_input:
                classified = classified.detach()
            logits = self.classifier(classified)
        return Outputs(features=features, projections=projections, logits=logits)


def parameter_kind(model: SimCLR) -> dict[str, ParameterKind]:
    """Say of each parameter what an optimizer must know of it, by the type of its module.

    Kernels are the weights of convolutions and dense layers; "norm" is every scale and bias of a
    normalisation. The classifier's two have kinds of their own, as LARS treats them apart.

    Source: google-research/simclr model_util.py get_optimizer, add_weight_decay.
    """
    kinds: dict[str, ParameterKind] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind: ParameterKind
            if isinstance(module, _NORMS):
                kind = "norm"
            elif module is model.classifier:
                kind = "classifier_kernel" if parameter.ndim > 1 else "classifier_bias"
            else:
                kind = "kernel" if parameter.ndim > 1 else "bias"
            kinds[f"{module_name}.{name}" if module_name else name] = kind
    return kinds
