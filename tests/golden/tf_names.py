"""Match the parameters of our networks with the variables of the official TensorFlow 1 code.

The official names number convolutions and batch norms in the order of creation; our modules are
registered in that order.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.simclr import SimCLR

_NORM_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def _norm(ours: str, official: str, norm: BatchNorm) -> dict[str, str]:
    return {
        f"{ours}.{name}": f"{official}/{theirs}"
        for name, theirs in _NORM_NAMES.items()
        if getattr(norm, name) is not None
    }


def official_names(model: SimCLR) -> dict[str, str]:
    """Our name -> official name of every parameter and running statistic."""
    names: dict[str, str] = {}
    convolutions = norms = 0
    for name, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, nn.Conv2d):
            number = f"_{convolutions}" if convolutions else ""
            names[f"{name}.weight"] = f"base_model/conv2d{number}/kernel"
            convolutions += 1
        elif isinstance(module, BatchNorm):
            number = f"_{norms}" if norms else ""
            names |= _norm(name, f"base_model/batch_normalization{number}", module)
            norms += 1
    for index, layer in enumerate(model.head.layers if model.head is not None else ()):
        official = f"head_contrastive/nl_{index}"
        names[f"head.layers.{index}.dense.weight"] = f"{official}/dense/kernel"
        names |= _norm(f"head.layers.{index}.bn", f"{official}/batch_normalization", layer.bn)
    if model.classifier is not None:
        names["classifier.weight"] = "head_supervised/linear_layer/dense/kernel"
        names["classifier.bias"] = "head_supervised/linear_layer/dense/bias"
    assert set(names) == set(model.state_dict())
    return names


def from_official(array: NDArray) -> Tensor:
    """HWIO -> OIHW for convolutions, [in, out] -> [out, in] for dense kernels; others unchanged."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    moved = array if axes is None else array.transpose(axes)
    return torch.from_numpy(np.array(moved, order="C"))


def load_official(model: SimCLR, arrays: dict[str, NDArray]) -> None:
    """Load official arrays into every parameter and running statistic of `model`."""
    state = {ours: from_official(arrays[theirs]) for ours, theirs in official_names(model).items()}
    model.load_state_dict(state, strict=True)
