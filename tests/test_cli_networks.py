"""Commands that bring networks in and take them out: files, messages, exit codes.

Every failure is one line on standard error and leaves no file behind.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner, Result

from bigsimclr.cli import app
from bigsimclr.interop import PortableModel
from bigsimclr.interop.model_file import write_model_file
from bigsimclr.interop.tf_names import official_names
from bigsimclr.models import Architecture
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from bigsimclr.stages.embed import embed
from bigsimclr.stages.load import load_model, load_network
from tests.interop import networks
from tests.interop.write_bundle import write_bundle

pytestmark = pytest.mark.slow

SMALL = ResNetBackbone(depth=18, width=1 / 8, stem="cifar")
HEAD = HeadSection(layers=3, output_width=16)
NAMES = ("ant", "bee", "cat", "dog")


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def spawn(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, where nothing catches what libraries print."""
    command = [sys.executable, "-m", "bigsimclr", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(folder: Path, code: int, line: str, *words: object) -> None:
    """Expect one line on standard error, an exit code, and the folder as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"bigsimclr: error: {line}\n"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def write_checkpoint(folder: Path, model: SimCLR) -> None:
    """Write what TF1's Saver writes of a network in training, with one slot of momentum."""
    state = model.state_dict()
    variables = {"global_step": np.array(250228, "int64")}
    for ours, theirs in official_names(model).items():
        weight = state[ours].numpy()
        if weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif weight.ndim == 2:
            weight = weight.T
        variables[theirs] = np.ascontiguousarray(weight)
    first = "base_model/conv2d/kernel"
    variables[f"{first}/Momentum"] = np.zeros_like(variables[first])
    folder.mkdir()
    write_bundle(folder / "model.ckpt-250228", variables)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-250228"\n')


@pytest.fixture(scope="module")
def network() -> PortableModel:
    return networks.portable(Architecture(SMALL, HEAD, 4, from_layer=1), size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, network: PortableModel) -> Path:
    folder = tmp_path_factory.mktemp("tf") / "r18"
    write_checkpoint(folder, network.model)
    return folder


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, network: PortableModel) -> Path:
    file = tmp_path_factory.mktemp("file") / "m.safetensors"
    write_model_file(file, network)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes in nested folders, one of them broken, and a text."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "er").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in {
        "a.jpg": (40, 50),
        "deep/b.JPEG": (64, 33),
        "deep/er/c.jpg": (32, 32),
    }.items():
        colours = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size).save(folder / name, format="JPEG")
    Image.new("L", (36, 36), 90).save(folder / "grey.jpg")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    return folder


READABLE = ["a.jpg", "deep/b.JPEG", "deep/er/c.jpg", "grey.jpg"]


def test_import_tf_brings_the_weights(
    tmp_path: Path, checkpoint: Path, network: PortableModel
) -> None:
    out = tmp_path / "m.safetensors"
    result = invoke("import-tf", checkpoint, "-o", out, "--verify")
    assert (result.exit_code, result.stderr) == (0, "")
    count = len(network.model.state_dict())
    *lines, guess, verified = result.stdout.splitlines()
    assert lines == [
        f"{out}: ResNet-18 0.125x, cifar stem; head of 3 layers to 16; 4 classes from head layer 1",
        f"from {checkpoint / 'model.ckpt-250228'}: {count} variables (TF1 names, checksums "
        "verified), 2 skipped (momentum, counters, copies)",
        "input: float32 [N,3,32,32] in [0,1], RGB, no mean or deviation subtracted; before it: "
        "centre square of the whole shorter side, then tf1 bicubic to 32 pixels",
    ]
    assert guess.startswith("the classifier is taken to read head layer 1, which ")
    assert guess.endswith("; --from-layer chooses another")
    assert verified == f"verified: {count} tensors read again, each bit as in the checkpoint"
    found = load_network(out)
    assert found.architecture == network.architecture
    assert found.classes == ("0", "1", "2", "3")
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_import_tf_takes_names_and_sizes(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    out = tmp_path / "m.safetensors"
    words = ["--classes", tmp_path / "names.txt", "--image-size", "48", "--resize", "tf2"]
    result = invoke("import-tf", checkpoint, "-o", out, "--from-layer", "2", *words)
    assert result.exit_code == 0, result.stderr
    assert "4 classes from head layer 2" in result.stdout
    assert "--from-layer chooses" not in result.stdout
    found = load_network(out)
    assert found.classes == NAMES
    assert found.portable.preprocessing.image_size == 48
    assert found.portable.preprocessing.resize == "tf2"


def test_import_tf_refusals(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "m.safetensors"
    none = tmp_path / "none"
    line = f"{none} is no file, no folder, and no checkpoint ({none}.index)"
    refused(tmp_path, 4, line, "import-tf", none, "-o", out)

    line = f"{tmp_path / 'm.pt'}: a .safetensors file is written; choose a name that ends so"
    refused(tmp_path, 2, line, "import-tf", checkpoint, "-o", tmp_path / "m.pt")

    names = tmp_path / "names.txt"
    words = ["import-tf", checkpoint, "-o", out, "--classes", names]
    result = invoke(*words)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"bigsimclr: error: --classes: {names} ")
    names.write_text("ant\nbee\n")
    result = invoke(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["names.txt"]

    out.write_text("mine")
    line = f"{out} exists already; choose another name"
    refused(tmp_path, 7, line, "import-tf", checkpoint, "-o", out)


def test_import_tf_of_a_damaged_checkpoint(tmp_path: Path, network: PortableModel) -> None:
    write_checkpoint(tmp_path / "r18", network.model)
    (data,) = (tmp_path / "r18").glob("*.data-*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    result = invoke("import-tf", tmp_path / "r18", "-o", tmp_path / "m.safetensors")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.startswith("bigsimclr: error: ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r18"]


def test_predict_names_the_class_of_every_image_it_can_read(
    tmp_path: Path, model_file: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = spawn("predict", model_file, photos)
    assert ended.returncode == 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith("broken.jpg cannot be read and is left out: ")
    assert ended.stdout == (
        "predictions.csv: classes of 4 images; 1 left out, unreadable: broken.jpg\n"
    )
    with Path("predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "class", "probability"]
    assert [row[0] for row in rows] == READABLE
    assert {row[1] for row in rows} <= {f"class {number}" for number in range(4)}
    assert all(0.25 <= float(row[2]) <= 1 for row in rows)


def test_predictions_are_those_of_the_model(
    tmp_path: Path, network: PortableModel, photos: Path
) -> None:
    """Without crop and resizing, an image's class is that of its pixels over 255."""
    prepared = network.preprocessing
    whole = type(prepared)(prepared.image_size, prepared.resize, 1.0)
    portable = PortableModel(network.model, network.architecture, NAMES, whole, "a test")
    write_model_file(tmp_path / "m.safetensors", portable)
    folder = photos / "deep/er"
    assert (
        invoke("predict", tmp_path / "m.safetensors", folder, "-o", tmp_path / "c.csv").exit_code
        == 0
    )
    with Image.open(folder / "c.jpg") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        logits = load_model(tmp_path / "m.safetensors")(pixels).logits
    probability, number = logits.softmax(1)[0].max(0)
    _, (name, label, written) = csv.reader((tmp_path / "c.csv").read_text().splitlines())
    assert (name, label) == ("c.jpg", NAMES[int(number)])
    assert float(written) == pytest.approx(float(probability), abs=2e-6)

    out = tmp_path / "e.npz"
    result = invoke("embed", tmp_path / "m.safetensors", folder, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}: features of 1 image\n")
    with np.load(out, allow_pickle=False) as stored:
        assert stored["names"].tolist() == ["c.jpg"]
        features = embed(load_model(tmp_path / "m.safetensors"), pixels).numpy()
        np.testing.assert_allclose(stored["features"], features, rtol=1e-5, atol=1e-6)


def test_one_image_is_enough(tmp_path: Path, model_file: Path, photos: Path) -> None:
    tables = []
    for images in (photos / "deep/er", photos / "deep/er/c.jpg"):
        out = tmp_path / "c.csv"
        result = invoke("predict", model_file, images, "-o", out)
        assert (result.exit_code, result.stdout) == (0, f"{out}: classes of 1 image\n")
        tables.append(out.read_text())
    assert tables[0] == tables[1]
    assert tables[0].splitlines()[1].startswith("c.jpg,class ")
    result = invoke("predict", model_file, photos / "broken.jpg", "-o", tmp_path / "d.csv")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith(f"{photos / 'broken.jpg'}: no image could be read\n")
    assert not (tmp_path / "d.csv").exists()


def test_embed_keeps_the_order_of_the_names(tmp_path: Path, model_file: Path, photos: Path) -> None:
    out = tmp_path / "new" / "e.npz"
    result = invoke("embed", model_file, photos, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{out}: features of 4 images; 1 left out, unreadable: broken.jpg\n"
    with np.load(out, allow_pickle=False) as stored:
        assert stored["names"].tolist() == READABLE
        assert stored["features"].shape == (4, 64)
        assert stored["features"].dtype == np.float32
        assert np.isfinite(stored["features"]).all()


@pytest.mark.parametrize(("command", "suffix"), [("embed", ".npz"), ("predict", ".csv")])
def test_embed_and_predict_refusals(
    tmp_path: Path, model_file: Path, photos: Path, command: str, suffix: str
) -> None:
    out = tmp_path / f"out{suffix}"
    wrong = tmp_path / "out.txt"
    line = f"{wrong}: a file that ends in {suffix} is written; choose such a name"
    refused(tmp_path, 2, line, command, model_file, photos, "-o", wrong)

    none = tmp_path / "none"
    line = f"{none} does not exist; name a run directory or a model file"
    refused(tmp_path, 4, line, command, none, photos, "-o", out)
    line = f"{photos} holds no checkpoint, and is no model file"
    refused(tmp_path, 4, line, command, photos, photos, "-o", out)

    out.write_text("before")
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(model_file.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    line = f"{damaged} is damaged (sha256 of the weights differs)"
    refused(tmp_path, 4, line, command, damaged, photos, "-o", out)

    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (none, empty, model_file):
        result = invoke(command, model_file, folder, "-o", out)
        assert (result.exit_code, result.stdout) == (3, "")
        assert result.stderr.startswith(f"bigsimclr: error: {folder}")
        assert result.stderr.count("\n") == 1
    (empty / "a.jpg").write_bytes(b"")
    line = f"{empty}: no image could be read"
    refused(tmp_path, 3, line, command, model_file, empty, "-o", out)

    (tmp_path / "file").touch()
    line = f"{tmp_path / 'file'} is a file, not a folder"
    refused(tmp_path, 7, line, command, model_file, photos, "-o", tmp_path / "file" / out.name)
    assert out.read_text() == "before"


def test_predict_needs_a_classifier(tmp_path: Path, photos: Path) -> None:
    file = tmp_path / "m.safetensors"
    write_model_file(file, networks.portable(Architecture(SMALL, HEAD, None, 0), size=32))
    line = f"{file} has no classifier; fine-tune it first, or use embed"
    refused(tmp_path, 4, line, "predict", file, photos, "-o", tmp_path / "c.csv")
    assert invoke("embed", file, photos, "-o", tmp_path / "e.npz").exit_code == 0


def test_export_to_a_model_file(tmp_path: Path, model_file: Path) -> None:
    out = tmp_path / "m.safetensors"
    result = invoke("export", model_file, "--to", "safetensors", "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{out}: ResNet-18 0.125x, cifar stem; head of 3 layers to 16; 4 classes from head layer 1",
        "input: float32 [N,3,32,32] in [0,1], RGB, no mean or deviation subtracted; before it: "
        "centre square of 0.875 of the shorter side, then tf2 bicubic to 32 pixels",
        f"load: bigsimclr.load_model({str(out)!r})",
    ]
    before, after = load_network(model_file), load_network(out)
    assert after.portable.preprocessing == before.portable.preprocessing
    assert (after.architecture, after.classes) == (before.architecture, before.classes)
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_export_to_other_libraries_says_what_the_file_holds(tmp_path: Path, to: str) -> None:
    file, out = tmp_path / "m.safetensors", tmp_path / "new" / "r18.safetensors"
    plain = Architecture(ResNetBackbone(depth=18), HEAD, 4, from_layer=1)
    write_model_file(file, networks.portable(plain, size=64))
    result = invoke("export", file, "--to", to, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    first, *lines = result.stdout.splitlines()
    assert first == f"{out}: ResNet-18 1x, imagenet stem"
    assert "left out: the projection head" in lines
    assert any(
        line.startswith("left out: the classifier, which reads head layer") for line in lines
    )
    assert f"    model.load_state_dict(safetensors.torch.load_file({str(out)!r}))" in lines
    assert "    model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)" in lines
    assert all(len(line) < 160 + len(str(out)) for line in lines)
    with safe_open(out, framework="pt") as opened:
        assert json.loads(opened.metadata()["input"])["mean"] == [0, 0, 0]
        assert "fc.weight" not in opened.keys()  # noqa: SIM118 - not a mapping


def test_export_refusals(tmp_path: Path, model_file: Path) -> None:
    file, out = tmp_path / "sk.safetensors", tmp_path / "x.safetensors"
    backbone = ResNetBackbone(depth=50, width=1 / 16, selective_kernel=True)
    write_model_file(file, networks.portable(Architecture(backbone, None, 4, 0), size=64))
    wide = (
        "width 0.0625 multiplies every channel count, while its wide ResNets widen the inner "
        "convolutions only; use --to safetensors or --to onnx"
    )
    line = f"torchvision has no such network: torchvision has no selective kernels; {wide}"
    refused(tmp_path, 2, line, "export", file, "--to", "torchvision", "-o", out)
    line = (
        "timm has no such network: timm's selective kernels are other blocks behind another "
        f"stem; {wide}"
    )
    refused(tmp_path, 2, line, "export", file, "--to", "timm", "-o", out)
    line = "--preprocess changes an ONNX graph; --to safetensors writes weights alone"
    refused(tmp_path, 2, line, "export", file, "--to", "safetensors", "--preprocess", "-o", out)
    none = tmp_path / "none"
    line = f"{none} does not exist; name a run directory or a model file"
    refused(tmp_path, 4, line, "export", none, "--to", "onnx", "-o", tmp_path / "x.onnx")
    line = f"{file} exists already; choose another name"
    refused(tmp_path, 7, line, "export", model_file, "--to", "safetensors", "-o", file)
    line = f"{tmp_path / 'x.npz'}: a .safetensors file is written; choose a name that ends so"
    refused(tmp_path, 2, line, "export", file, "--to", "safetensors", "-o", tmp_path / "x.npz")


def test_export_to_onnx_prints_nothing_but_its_notes(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file, out = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    small = Architecture(SMALL.model_copy(update={"depth": 10}), None, 4, 0)
    write_model_file(file, networks.portable(small, size=16))
    ended = spawn("export", file, "--to", "onnx", "--preprocess", "-o", out)
    assert (ended.returncode, ended.stderr) == (0, "")
    *lines, last = ended.stdout.splitlines()
    assert lines == [
        f"{out}: ResNet-10 0.125x, cifar stem; 4 classes from the features",
        "input: uint8 [batch,16,16,3], RGB in 0..255; before it: centre square of 0.875 of the "
        "shorter side, then tf2 bicubic to 16 pixels",
        "outputs: features, logits",
    ]
    assert last.startswith(f"opset 20; onnxruntime {onnxruntime.__version__} agrees with PyTorch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.safetensors"]


def test_onnx_without_its_packages(tmp_path: Path, model_file: Path) -> None:
    program = f"""
import sys
sys.modules["onnxruntime"] = None
from bigsimclr.cli import main
sys.argv[1:] = ["export", {str(model_file)!r}, "--to", "onnx", "-o", {str(tmp_path / "x.onnx")!r}]
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "bigsimclr: error: ONNX files need the packages onnx, onnxruntime and onnxscript: "
        "pip install 'bigsimclr[onnx]'\n"
    )
    assert not list(tmp_path.iterdir())
