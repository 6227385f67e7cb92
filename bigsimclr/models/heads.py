"""The projection head and the linear classifier.

Shapes: N images, F = feature width, D = projection width, K classes.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from bigsimclr.models.layers import Dense
from bigsimclr.models.norm import BatchNorm


class HeadLayer(nn.Module):
    """A dense layer without bias and its batch norm; ReLU, and a bias in the norm, except last.

    Source: google-research/simclr model_util.py linear_layer, projection_head.
    """

    def __init__(
        self, in_width: int, out_width: int, *, is_last: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.is_last = is_last
        self.dense = Dense(in_width, out_width, has_bias=False, generator=generator)
        self.bn = BatchNorm(out_width, has_bias=not is_last)

    @override
    def forward(
        self,
        inputs: Tensor,  # [N, in_width]
    ) -> Tensor:  # [N, out_width]
        """Apply the layer."""
        outputs: Tensor = self.bn(self.dense(inputs), relu=not self.is_last)
        return outputs


class ProjectionHead(nn.Module):
    """Map features to projections through dense layers; every layer's output is returned.

    Args:
        in_width: F; also the width of every layer but the last.
        layers: Dense layers of the whole head.
        output_width: D, the width of the last layer.
        generator: Draws the initial weights; None: PyTorch's own.
        keep_layers: Build only this many of the first layers; None builds all. The last layer of
            the whole head has no ReLU and no bias, so a cut head is not a shorter head.

    Raises:
        ValueError: `layers` or `keep_layers` is out of range.

    Source: google-research/simclr model_util.py projection_head.
    """

    def __init__(
        self,
        in_width: int,
        *,
        layers: int = 3,
        output_width: int = 128,
        generator: torch.Generator | None = None,
        keep_layers: int | None = None,
    ) -> None:
        super().__init__()
        generator = generator or torch.default_generator
        kept = layers if keep_layers is None else keep_layers
        if not 1 <= kept <= layers:
            raise ValueError(f"a head of {layers} layers cannot keep {kept}")
        self.layers = nn.ModuleList(
            HeadLayer(
                in_width,
                output_width if index == layers - 1 else in_width,
                is_last=index == layers - 1,
                generator=generator,
            )
            for index in range(kept)
        )
        self.widths = tuple(
            output_width if index == layers - 1 else in_width for index in range(kept)
        )

    @override
    def forward(
        self,
        features: Tensor,  # [N, F]
    ) -> tuple[Tensor, ...]:  # per layer [N, F]; the last of a whole head [N, D]
        """Project features."""
        outputs: list[Tensor] = []
        hidden = features
        for layer in self.layers:
            hidden = layer(hidden)
            outputs.append(hidden)
        return tuple(outputs)


def classifier(in_width: int, classes: int, generator: torch.Generator | None) -> nn.Linear:
    """Build a linear classifier with weights from N(0, 0.01), or zero without a generator.

    Source: google-research/simclr model_util.py supervised_head; model.py zero_init_logits_layer.
    """
    return Dense(in_width, classes, has_bias=True, generator=generator)
