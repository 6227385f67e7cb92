"""Forward passes of the official code, and the same passes by our networks."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.models import Architecture
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.golden.paths import golden_dir

FOLDER = golden_dir() / "ckpt_forward"
CASES = sorted(path.parent for path in FOLDER.glob("*/forward.npz"))
FROM_LAYER = 1  # the stored classifiers read the head's first layer
FLOAT64_TOLERANCE = 1e-6
# Ten times the float32 error that the official code itself has, and no less than this.
_FLOOR = {"eval": 2e-5, "train": 1e-4, "train_bn_after": 1e-4}
_HOOKED = {
    "initial_conv": "conv1",
    "initial_max_pool": "maxpool",
    "block_group1": "layer1",
    "block_group2": "layer2",
    "block_group3": "layer3",
    "block_group4": "layer4",
}

Arrays = Mapping[str, NDArray]
Mode = Literal["eval", "train", "train_bn_after"]


@dataclass(frozen=True)
class Case:
    directory: Path
    info: Mapping[str, Any]
    stored: Arrays

    @property
    def architecture(self) -> Architecture:
        """What the official code was told to build."""
        config = self.info["cfg"]
        shapes = dict(self.info["variables"])
        return Architecture(
            backbone=ResNetBackbone(
                depth=config["depth"],
                width=float(Fraction(config["w"])),
                selective_kernel=config["sk"] > 0,
                stem="cifar" if config["size"] <= 32 else "imagenet",
            ),
            head=HeadSection(
                layers=sum(bool(re.search(r"/nl_\d+/dense/kernel$", name)) for name in shapes),
                output_width=config["proj"],
            ),
            classes=shapes["head_supervised/linear_layer/dense/bias"][0],
            from_layer=FROM_LAYER,
        )

    def tolerance(self, mode: Mode) -> float:
        """Of all outputs of one mode, relative to the largest value of an output."""
        own = [
            error["rel"]
            for name, error in self.info.get("fp32_vs_fp64_maxabs", {}).items()
            if re.split(r"[/(]", name)[0] == mode
        ]
        return max(10 * max(own, default=0.0), _FLOOR[mode])

    def images(self, dtype: torch.dtype, device: torch.device) -> Tensor:  # [N, 3, H, W]
        return torch.from_numpy(self.stored["x"]).permute(0, 3, 1, 2).to(device, dtype)

    def official(self, prefix: str) -> Arrays:
        found = (name for name in self.stored if name.startswith(prefix))
        return {name.removeprefix(prefix): self.stored[name] for name in found}

    def too_far(self, ours: Arrays, prefix: str, tolerance: float) -> dict[str, float]:
        """Relative errors of those of our values that differ from the official ones by more."""
        errors = self.errors(ours, prefix)
        return {name: error for name, error in errors.items() if not error <= tolerance}

    def errors(self, ours: Arrays, prefix: str) -> dict[str, float]:
        official = self.official(prefix)
        assert official, f"{self.directory} has nothing under {prefix}"
        return {name: relative_error(ours[name], array) for name, array in official.items()}


@cache
def read_case(directory: Path) -> Case:
    return Case(
        directory,
        json.loads((directory / "info.json").read_text()),
        dict(np.load(directory / "forward.npz")),
    )


def run(model: SimCLR, images: Tensor) -> dict[str, NDArray]:
    """All outputs under the official names, activations as NHWC."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.backbone.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name, module in _HOOKED.items()
    ]
    with torch.no_grad():
        outputs = model(images)
    for handle in handles:
        handle.remove()
    arrays = {name: on_host(output.permute(0, 2, 3, 1)) for name, output in seen.items()}
    arrays["final_avg_pool"] = on_host(outputs.features)
    for index, projection in enumerate(outputs.projections, start=1):
        arrays[f"proj_{index}"] = on_host(projection)
    arrays["logits_sup"] = on_host(outputs.logits)
    rows = F.normalize(torch.from_numpy(arrays[f"proj_{len(outputs.projections)}"]), dim=1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    labels = torch.arange(len(rows)).roll(len(rows) // 2)
    arrays["loss"] = 2 * F.cross_entropy(logits, labels).numpy()
    return arrays


def on_host(tensor: Tensor) -> NDArray:
    """In float32 if it has fewer bits, which NumPy does not know."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def relative_error(ours: NDArray, official: NDArray) -> float:
    """Largest difference over the largest official value; official may hold fewer images."""
    if official.ndim:
        ours = ours[: len(official)]
    assert ours.shape == official.shape
    return float(np.abs(ours - official).max() / np.abs(official).max())
