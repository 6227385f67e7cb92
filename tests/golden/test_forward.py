"""Every output of the network equals that of the official code with the same weights."""

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.golden.paths import golden_dir
from tests.golden.tf_bundle import read_bundle
from tests.golden.tf_names import load_official, official_names

pytestmark = pytest.mark.golden

FROM_LAYER = 1  # the stored classifiers read the head's first layer
CASES = sorted(path.parent for path in golden_dir().glob("ckpt_forward/*/forward.npz"))
HOOKED = {
    "initial_conv": "conv1",
    "initial_max_pool": "maxpool",
    "block_group1": "layer1",
    "block_group2": "layer2",
    "block_group3": "layer3",
    "block_group4": "layer4",
}
# Ten times the float32 error that the official code itself has, and no less than this.
FLOOR = {"eval": 2e-5, "train": 1e-4, "train_bn_after": 1e-4}
FLOAT64_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    weights: dict[str, NDArray]
    stored: dict[str, NDArray]
    errors: dict[str, float]  # "<mode>/<output>" -> relative float32 error of the official code

    def tolerance(self, mode: str) -> float:
        """Of all outputs of one mode, relative to the largest value of an output."""
        own = [error for name, error in self.errors.items() if re.split(r"[/(]", name)[0] == mode]
        return max(10 * max(own, default=0.0), FLOOR[mode])

    def model(self, dtype: torch.dtype) -> SimCLR:
        model = build_model(self.architecture, seed=0)
        load_official(model, self.weights)
        return model.to(dtype)


def read_case(directory: Path) -> Case:
    info = json.loads((directory / "info.json").read_text())
    config = info["cfg"]
    plain = directory / "weights_tf1_names.npz"
    weights = dict(np.load(plain)) if plain.exists() else read_bundle(directory / "tf1")
    architecture = Architecture(
        backbone=ResNetBackbone(
            depth=config["depth"],
            width=float(Fraction(config["w"])),
            selective_kernel=config["sk"] > 0,
            stem="cifar" if config["size"] <= 32 else "imagenet",
        ),
        head=HeadSection(
            layers=sum(name.endswith("/dense/kernel") and "/nl_" in name for name in weights),
            output_width=config["proj"],
        ),
        classes=weights["head_supervised/linear_layer/dense/bias"].size,
        from_layer=FROM_LAYER,
    )
    return Case(
        architecture=architecture,
        weights=weights,
        stored=dict(np.load(directory / "forward.npz")),
        errors={name: error["rel"] for name, error in info.get("fp32_vs_fp64_maxabs", {}).items()},
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param)


def run(model: SimCLR, images: Tensor) -> dict[str, NDArray]:
    """All outputs under the official names, activations as NHWC."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.backbone.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name, module in HOOKED.items()
    ]
    with torch.no_grad():
        outputs = model(images)
    for handle in handles:
        handle.remove()
    arrays = {name: output.permute(0, 2, 3, 1).numpy() for name, output in seen.items()}
    arrays["final_avg_pool"] = outputs.features.numpy()
    for index, projection in enumerate(outputs.projections, start=1):
        arrays[f"proj_{index}"] = projection.numpy()
    arrays["logits_sup"] = outputs.logits.numpy()
    rows = F.normalize(outputs.projections[-1], dim=1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    labels = torch.arange(len(rows)).roll(len(rows) // 2)
    arrays["loss"] = 2 * F.cross_entropy(logits, labels).numpy()
    return arrays


def relative_error(ours: NDArray, official: NDArray) -> float:
    """Largest difference over the largest official value; official may hold fewer images."""
    if official.ndim:
        ours = ours[: len(official)]
    assert ours.shape == official.shape
    return float(np.abs(ours - official).max() / np.abs(official).max())


def compare(ours: dict[str, NDArray], case: Case, *, prefix: str, tolerance: float) -> None:
    official = {
        name.removeprefix(prefix): array
        for name, array in case.stored.items()
        if name.startswith(prefix)
    }
    assert official
    errors = {name: relative_error(ours[name], array) for name, array in official.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def images(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(case.stored["x"]).permute(0, 3, 1, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_evaluation_outputs(case: Case, dtype: torch.dtype) -> None:
    ours = run(case.model(dtype).eval(), images(case, dtype))
    compare(ours, case, prefix="eval/", tolerance=case.tolerance("eval"))
    if dtype == torch.float64:
        compare(ours, case, prefix="eval64/", tolerance=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_training_outputs_and_running_statistics(case: Case, dtype: torch.dtype) -> None:
    model = case.model(dtype).train()
    ours = run(model, images(case, dtype))
    compare(ours, case, prefix="train/", tolerance=case.tolerance("train"))
    if dtype == torch.float64:
        compare(ours, case, prefix="train64/", tolerance=FLOAT64_TOLERANCE)
    state = model.state_dict()
    after = {theirs: state[name].numpy() for name, theirs in official_names(model).items()}
    compare(after, case, prefix="bn_after/", tolerance=case.tolerance("train_bn_after"))


def test_every_official_variable_has_a_place(case: Case) -> None:
    names = set(official_names(build_model(case.architecture, seed=0)).values())
    variables = {name for name in case.weights if not name.endswith("Momentum")} - {"global_step"}
    assert names == variables


def test_cases_were_found() -> None:
    assert CASES
