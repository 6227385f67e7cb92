"""ONNX graphs give PyTorch's outputs for any number of images, and carry nothing of this machine.

The graphs of depth 50 are the networks the format is for; those of depth 10 try what does not
depend on depth, since making a graph takes as long as it has nodes.
"""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.errors import CheckpointError, RecipeError, StorageError
from bigsimclr.models import Architecture
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.interop import networks

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from bigsimclr.interop import onnx_file  # noqa: E402 - needs the packages above
from bigsimclr.interop.onnx_file import OnnxExported, export_onnx  # noqa: E402

HEAD = HeadSection(layers=3, output_width=8)
SMALL = ResNetBackbone(depth=10, width=1 / 8)
PLAIN = ResNetBackbone(depth=50, width=1 / 16)
SELECTIVE = ResNetBackbone(depth=50, width=1 / 16, selective_kernel=True)


class Case:
    """A network, its graph, and what the export said of it."""

    def __init__(
        self, folder: Path, architecture: Architecture, size: int, *, as_bytes: bool = False
    ) -> None:
        self.portable = networks.portable(architecture, size=size)
        self.as_bytes = as_bytes
        self.exported: OnnxExported = export_onnx(
            self.portable, folder / "m.onnx", with_preprocessing=as_bytes
        )

    @property
    def path(self) -> Path:
        return self.exported.path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A classifier in the middle of a head."""
    architecture = Architecture(SMALL, HEAD, 5, from_layer=1)
    return Case(tmp_path_factory.mktemp("small"), architecture, 32)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A head that ends at its classifier, behind a CIFAR stem; images as bytes."""
    backbone = SMALL.model_copy(update={"stem": "cifar"})
    architecture = Architecture(backbone, HEAD, 3, from_layer=2, keep_head_layers=2)
    return Case(tmp_path_factory.mktemp("cut"), architecture, 8, as_bytes=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A classifier on the features, no head; images as bytes."""
    architecture = Architecture(PLAIN, None, 5, from_layer=0)
    return Case(tmp_path_factory.mktemp("plain"), architecture, 64, as_bytes=True)


@pytest.fixture(scope="module")
def selective(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A head without a classifier."""
    architecture = Architecture(SELECTIVE, HEAD, None, from_layer=0)
    return Case(tmp_path_factory.mktemp("selective"), architecture, 64)


def inputs(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """Draw images: as the graph takes them, and as the network does."""
    size = case.portable.preprocessing.image_size
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    images = torch.from_numpy(pixels.numpy().transpose(0, 3, 1, 2).astype("float32") / 255)
    return (pixels if case.as_bytes else images), images


def run(graph: Path, images: Tensor) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


@torch.no_grad()
def assert_alike(case: Case, count: int, graph: Path | None = None) -> None:
    fed, images = inputs(case, count)
    found, ours = run(graph or case.path, fed), case.portable.model(images)
    expected = {"features": ours.features}
    expected |= {f"projection_{n}": each for n, each in enumerate(ours.projections, start=1)}
    if ours.logits is not None:
        expected["logits"] = ours.logits
    assert list(found) == list(expected)
    for name, output in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == tuple(output.shape), name
        largest = float(output.abs().max())
        assert largest > 0.01, name
        difference = np.abs(found[name] - output.numpy()).max()
        assert difference <= 1e-4 * largest, (name, difference, largest)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "name",
    [
        "small",
        "cut",
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("selective", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_images_gives_pytorchs_outputs(
    name: str, count: int, request: pytest.FixtureRequest
) -> None:
    assert_alike(request.getfixturevalue(name), count)


def test_the_graph_says_what_goes_in_and_what_comes_out(small: Case, cut: Case) -> None:
    session = onnxruntime.InferenceSession(str(small.path), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape) == (
        "images",
        "tensor(float)",
        ["batch", 3, 32, 32],
    )
    assert [(output.name, output.shape) for output in session.get_outputs()] == [
        ("features", ["batch", 64]),
        ("projection_1", ["batch", 64]),
        ("projection_2", ["batch", 64]),
        ("projection_3", ["batch", 8]),
        ("logits", ["batch", 5]),
    ]
    metadata = session.get_modelmeta().custom_metadata_map
    assert set(metadata) == {"input", "preprocessing", "classes", "architecture", "origin"}
    assert metadata["input"] == (
        "float32 [batch,3,32,32] in [0,1], RGB, no mean or deviation subtracted; before it: "
        "centre square of 0.875 of the shorter side, then tf2 bicubic to 32 pixels"
    )
    assert json.loads(metadata["preprocessing"]) == asdict(small.portable.preprocessing)
    assert json.loads(metadata["classes"]) == [f"class {number}" for number in range(5)]
    assert Architecture.from_json(metadata["architecture"]) == small.portable.architecture
    assert metadata["origin"] == "a test"

    session = onnxruntime.InferenceSession(str(cut.path), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.type, taken.shape) == ("tensor(uint8)", ["batch", 8, 8, 3])
    written = session.get_modelmeta().custom_metadata_map["input"]
    assert written.startswith("uint8 [batch,8,8,3], RGB in 0..255; before it: ")


def test_the_notes_are_what_the_user_needs(small: Case) -> None:
    exported = small.exported
    assert exported.difference < 1e-5
    assert exported.opset == 20
    (opset,) = (entry for entry in onnx.load(exported.path).opset_import if not entry.domain)
    assert opset.version == 20
    metadata = onnxruntime.InferenceSession(str(small.path)).get_modelmeta().custom_metadata_map
    assert exported.notes == (
        f"input: {metadata['input']}",
        "outputs: features, projection_1, projection_2, projection_3, logits",
        f"opset 20; onnxruntime {onnxruntime.__version__} agrees with PyTorch to "
        f"{exported.difference:.1e} of the largest value on a sample",
    )
    assert [path.name for path in small.path.parent.iterdir()] == ["m.onnx"]


def test_nothing_of_this_machine_is_in_the_graph(small: Case, cut: Case) -> None:
    for case in (small, cut):
        content = case.path.read_bytes()
        for root in (Path(torch.__file__).parents[1], Path(__file__).parents[2], case.path.parent):
            assert str(root).encode() not in content
        for trace in (b"site-packages", b".py", b"forward("):
            assert trace not in content
        model = onnx.load(case.path)
        graph = model.graph
        assert not model.doc_string + graph.doc_string
        for part in (*graph.node, *graph.input, *graph.output, *graph.value_info):
            assert not part.doc_string
            assert not part.metadata_props
        assert all(not tensor.doc_string for tensor in graph.initializer)


def test_the_network_is_as_it_was(small: Case) -> None:
    again = networks.portable(small.portable.architecture, size=32)
    assert not small.portable.model.training
    assert all(parameter.requires_grad for parameter in small.portable.model.parameters())
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(small.portable.model.state_dict()[name], tensor), name


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(
    tmp_path: Path, small: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "EMBEDDED_BYTES", 0)
    (tmp_path / "made").mkdir()
    exported = export_onnx(small.portable, tmp_path / "made" / "m.onnx")
    assert exported.notes[-1] == "the weights are in m.onnx.data: keep the two files together"
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == ["m.onnx", "m.onnx.data"]
    weights = sum(tensor.nbytes for tensor in small.portable.model.parameters())
    # Batch norms are folded into the convolutions before them.
    assert 0.9 * weights < (tmp_path / "made" / "m.onnx.data").stat().st_size < 1.1 * weights
    assert exported.path.stat().st_size < small.path.stat().st_size - weights / 2
    assert str(tmp_path).encode() not in exported.path.read_bytes()
    (tmp_path / "made").rename(tmp_path / "moved")
    assert_alike(small, 2, tmp_path / "moved" / "m.onnx")


@pytest.mark.parametrize("there", ["m.onnx", "m.onnx.data"])
def test_files_that_exist_are_kept(
    tmp_path: Path, small: Case, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.setattr(onnx_file, "EMBEDDED_BYTES", 0)
    (tmp_path / there).write_text("mine")
    with pytest.raises(StorageError, match=rf"/{there} exists already"):
        export_onnx(small.portable, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_names_and_damaged_weights_are_refused(tmp_path: Path, small: Case) -> None:
    with pytest.raises(RecipeError, match=r"m\.pb: an \.onnx file is written"):
        export_onnx(small.portable, tmp_path / "m.pb")
    damaged = networks.portable(small.portable.architecture, size=32)
    damaged.model.backbone.bn1.running_var.fill_(math.nan)
    with pytest.raises(CheckpointError, match="the network's features are not finite"):
        export_onnx(damaged, tmp_path / "m.onnx")
    classifier = networks.portable(small.portable.architecture, size=32)
    classifier.model.classifier.bias.data[0] = math.inf
    with pytest.raises(CheckpointError, match="the network's logits are not finite"):
        export_onnx(classifier, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_not_written(
    tmp_path: Path, small: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "EMBEDDED_BYTES", 0)
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match=r"m\.onnx is not written: onnxruntime .* differ"):
        export_onnx(small.portable, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_images_of_another_size_are_refused_by_the_graph(small: Case) -> None:
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(small.path, torch.rand(1, 3, 40, 40))


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_are_named(tmp_path: Path, missing: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import bigsimclr.interop.onnx_file
except ImportError as error:
    print(type(error).__name__, error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout == (
        "MissingExtraError ONNX files need the packages onnx, onnxruntime and onnxscript: "
        "pip install 'bigsimclr[onnx]'\n"
    )
