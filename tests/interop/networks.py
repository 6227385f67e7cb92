"""Networks to convert: weights drawn so that every one of them shows in the outputs."""

import math

import torch
from torch import Tensor

from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.models import Architecture, build_model, restore_model


def drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a weight under which every layer matters and no activation explodes."""
    values = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        return values * math.sqrt(2 * like.shape[0] / like.numel())
    if name.endswith(("running_mean", "bias")):
        return 0.1 * values
    return 0.5 + 0.5 * torch.rand(like.shape, generator=generator)


def portable(architecture: Architecture, *, size: int = 64) -> PortableModel:
    """Draw a network; equal depths get equal weights."""
    generator = torch.Generator().manual_seed(architecture.backbone.depth)
    with torch.device("meta"):
        shapes = build_model(architecture, seed=0).state_dict()
    weights = {name: drawn(name, like, generator) for name, like in shapes.items()}
    return PortableModel(
        restore_model(architecture, weights),
        architecture,
        tuple(f"class {number}" for number in range(architecture.classes or 0)),
        Preprocessing(image_size=size, resize="tf2", eval_crop_proportion=0.875),
        "a test",
    )
