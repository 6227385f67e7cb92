"""Exports to torchvision's and timm's ResNets, loaded by the very lines that the notes give."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from bigsimclr.errors import CheckpointError, RecipeError, StorageError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.interop.export import Exported, _sample, export_names
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.resnet import SameMaxPool
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.interop import networks, plain_resnet

# From torchvision 0.29.2 `resnet50().state_dict()` and timm 1.0.31 `create_model("resnet50")`.
NAMES = Path(__file__).with_name("resnet50_names.txt")
POOL = "model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)"

Library = Literal["torchvision", "timm"]


def portable(
    depth: Literal[18, 34, 50, 200],
    *,
    classes: int | None = None,
    from_layer: int = 0,
    size: int = 64,
) -> PortableModel:
    head = HeadSection(layers=2, output_width=8) if from_layer else None
    return networks.portable(
        Architecture(ResNetBackbone(depth=depth), head, classes, from_layer), size=size
    )


@pytest.fixture(scope="module")
def resnet50() -> PortableModel:
    return portable(50, classes=1000)


def code(exported: Exported) -> list[str]:
    return [note.strip() for note in exported.notes if note.startswith("    ")]


def loaded(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, *, without: str = ""
) -> plain_resnet.ResNet:
    """Run the documented lines; the libraries themselves are replaced by their plain likeness."""
    monkeypatch.setitem(sys.modules, "torchvision", plain_resnet.torchvision())
    monkeypatch.setitem(sys.modules, "timm", plain_resnet.timm())
    names: dict[str, plain_resnet.ResNet] = {}
    exec("\n".join(line for line in code(exported) if line != without), names)
    assert not names["model"].training
    return names["model"]


@torch.no_grad()
def difference(
    theirs: nn.Module, portable: PortableModel, images: Tensor | None = None
) -> tuple[float, int]:
    """Compare with our logits, or features: largest difference and number of other top-1."""
    size = portable.preprocessing.image_size
    if images is None:
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    outputs = portable.model(images)
    fc = portable.architecture.classes is not None and portable.architecture.from_layer == 0
    ours = outputs.logits if fc else outputs.features
    found = theirs(images)
    assert found.shape == ours.shape
    other = int((found.argmax(dim=1) != ours.argmax(dim=1)).sum())
    return float((found - ours).abs().max() / ours.abs().max()), other


def note(exported: Exported, start: str) -> str:
    (found,) = (note for note in exported.notes if note.startswith(start))
    return found


def reported(exported: Exported) -> tuple[float, int | None]:
    text = note(exported, "measured on 2 sample images")
    (share,) = re.findall(r"changes features by up to (\S+) of the largest value", text)
    others = re.findall(r"the top-1 class of (\d) of them", text)
    return float(share), int(others[0]) if others else None


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_resnet50_has_their_names_shapes_and_outputs(
    tmp_path: Path, resnet50: PortableModel, monkeypatch: pytest.MonkeyPatch, to: Library
) -> None:
    before = {name: tensor.clone() for name, tensor in resnet50.model.state_dict().items()}
    exported = export_names(resnet50, tmp_path / "r50.safetensors", to=to)
    tensors = load_file(exported.path)
    found = {f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()}
    assert found == set(NAMES.read_text(encoding="utf-8").splitlines())
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64
            assert tensor == 0
        else:
            assert tensor.dtype == torch.float32

    model = loaded(exported, monkeypatch)
    assert difference(model, resnet50)[0] < 1e-5
    model = loaded(exported, monkeypatch, without=POOL)
    assert difference(model, resnet50)[0] > 1e-3

    # What the notes report is what their network gives on the same sample.
    images = _sample(64)
    _, others = difference(model, resnet50, images)
    model.fc = nn.Identity()
    with torch.no_grad():
        features = resnet50.model(images).features
        share = float((model(images) - features).abs().max() / features.abs().max())
    assert reported(exported) == (pytest.approx(share, rel=0.06), others)

    assert isinstance(resnet50.model.backbone.maxpool, SameMaxPool)
    for name, tensor in resnet50.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_goes_in_is_written_down(
    tmp_path: Path, resnet50: PortableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export_names(resnet50, tmp_path / "r50.safetensors", to="timm")
    with safe_open(exported.path, framework="pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["input"]) == {
        "range": [0, 1],
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "image_size": 64,
        "crop_proportion": 0.875,
        "interpolation": "bicubic",
        "resize": "tf2",
    }
    assert json.loads(metadata["classes"]) == list(resnet50.classes)
    assert metadata["origin"] == "a test"
    assert "float32 [N,3,64,64] in [0,1], RGB, no mean" in note(exported, "input: ")
    assert "centre square of 0.875 of the shorter side" in note(exported, "before it: ")
    assert loaded(exported, monkeypatch).pretrained_cfg == {
        "input_size": (3, 64, 64),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }


@pytest.mark.parametrize("size", [65, 66])
def test_odd_maps_need_no_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    network = portable(18, size=size)
    exported = export_names(network, tmp_path / "r18.safetensors", to="torchvision")
    assert POOL not in code(exported)
    assert note(exported, "no replacement is needed for odd maps").endswith(POOL)
    assert reported(exported) == (0, None)
    assert difference(loaded(exported, monkeypatch), network)[0] < 1e-5


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize("depth", [18, 34])
def test_basic_blocks_get_the_official_shortcut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: Literal[18, 34], to: Library
) -> None:
    network = portable(depth, classes=5)
    exported = export_names(network, tmp_path / "r.safetensors", to=to)
    assert "layer1.0" in note(exported, "shortcut: ")
    assert difference(loaded(exported, monkeypatch), network)[0] < 1e-5
    (shortcut,) = (line for line in code(exported) if "downsample" in line)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1\.0\.downsample"):
        loaded(exported, monkeypatch, without=shortcut)


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize("from_layer", [0, 1])
def test_networks_without_fc_give_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_layer: int, to: Library
) -> None:
    network = portable(18, classes=5 if from_layer else None, from_layer=from_layer)
    exported = export_names(network, tmp_path / "r18.safetensors", to=to)
    assert difference(loaded(exported, monkeypatch), network)[0] < 1e-5
    assert reported(exported)[1] is None
    omissions = [note for note in exported.notes if note.startswith("left out: ")]
    assert ["classifier" in note for note in omissions] == ([False, True] if from_layer else [])
    assert all("head" in note for note in omissions)
    with safe_open(exported.path, framework="pt") as opened:
        assert json.loads(opened.metadata()["classes"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, 3])
def test_resnet200_is_built_by_torchvisions_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int | None
) -> None:
    network = portable(200, classes=classes, size=32)
    exported = export_names(network, tmp_path / "r200.safetensors", to="torchvision")
    assert difference(loaded(exported, monkeypatch), network)[0] < 1e-5


@pytest.mark.parametrize("side", [3, 4, 5, 6, 7, 8, 112, 113])
def test_the_replacement_is_the_official_pool(side: int) -> None:
    # Below zero, where a padding of zeros would win.
    maps = -torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    official, theirs = SameMaxPool(), nn.MaxPool2d(3, 2, 1)
    model = plain_resnet.ResNet(plain_resnet.BasicBlock, [1])
    exec(POOL, {"model": model, "torch": torch})
    assert torch.equal(model.maxpool(maps), official(maps)) == (side % 2 == 0)
    assert torch.equal(theirs(maps), official(maps)) == (side % 2 == 1)


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        (ResNetBackbone(depth=50, selective_kernel=True), "selective kernels"),
        (ResNetBackbone(depth=18, stem="cifar"), "CIFAR stem"),
        (ResNetBackbone(depth=50, width=2), "width 2 multiplies every channel"),
        (ResNetBackbone(depth=10), "no ResNet-10"),
        (ResNetBackbone(depth=10, stem="cifar"), "CIFAR stem; no ResNet-10"),
    ],
)
def test_what_they_cannot_hold_is_refused(
    tmp_path: Path, backbone: ResNetBackbone, why: str, to: Library
) -> None:
    architecture = Architecture(backbone, None, None, 0)
    with torch.device("meta"):
        model = build_model(architecture, seed=0).eval()
    prepared = Preprocessing(image_size=64, resize="tf2", eval_crop_proportion=0.875)
    network = PortableModel(model, architecture, (), prepared, "a test")
    with pytest.raises(RecipeError, match=why) as refusal:
        export_names(network, tmp_path / "r.safetensors", to=to)
    assert str(refusal.value).startswith(f"{to} has no such network: ")
    assert str(refusal.value).endswith("use --to safetensors or --to onnx")
    assert not list(tmp_path.iterdir())


def test_files_and_weights_are_refused(tmp_path: Path) -> None:
    network = portable(18, size=32)
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(StorageError, match="exists already"):
        export_names(network, tmp_path / "there.safetensors", to="timm")
    with pytest.raises(RecipeError, match=r"r\.pt: a \.safetensors file"):
        export_names(network, tmp_path / "r.pt", to="timm")
    network.model.backbone.bn1.running_var.fill_(math.nan)
    with pytest.raises(CheckpointError, match="features are not finite"):
        export_names(network, tmp_path / "r.safetensors", to="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
