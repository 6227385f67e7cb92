"""Official checkpoints of every form become networks that compute what the official code did."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bigsimclr as bsc
from bigsimclr.interop.model_file import read_model_file
from bigsimclr.interop.tf_checkpoint import find_checkpoint, import_checkpoint
from bigsimclr.interop.tf_names import from_official, official_names
from tests.golden.checkpoints import checkpoints
from tests.golden.forward import CASES, FLOAT64_TOLERANCE, Case, read_case, relative_error, run
from tests.interop.official import same_bits

pytestmark = [pytest.mark.golden, pytest.mark.slow]

CPU = torch.device("cpu")

# The command line where TensorFlow cannot be imported, and the network it wrote.
WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
import numpy
import bigsimclr
from bigsimclr.__main__ import main
sys.argv = ["bigsimclr", "import-tf", sys.argv[1], "--verify", "--out", *sys.argv[2:]]
images = numpy.load(sys.argv.pop())
logits = sys.argv.pop()
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
import torch
with torch.no_grad():
    outputs = bigsimclr.load_model(sys.argv[-1])(torch.from_numpy(images))
numpy.save(logits, outputs.logits)
"""


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param)


@pytest.fixture(scope="module")
def imported(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Import every form of a case's checkpoint: form -> model file."""
    folder = tmp_path_factory.mktemp(case.directory.name)
    files = {}
    for form, path in checkpoints(case.directory, folder / "unpacked").items():
        files[form] = folder / f"{form}.safetensors"
        converted = bsc.import_tf(path, files[form], verify=True)
        assert converted.path == files[form]
        names = len(official_names(bsc.load_model(files[form])))
        assert f"verified: {names} tensors read again, each bit as in the checkpoint" in (
            converted.notes
        )
        recorded = "the classifier reads head layer 1, as the graph beside the variables says"
        assert (recorded in converted.notes) == (form == "saved_model")
    return files


def test_cases_were_found(case: Case, imported: dict[str, Path]) -> None:
    assert imported, f"{case.directory} holds no checkpoint"


def test_evaluation_outputs(case: Case, imported: dict[str, Path]) -> None:
    for form, file in imported.items():
        model = bsc.load_model(file)
        assert not model.training
        ours = run(model, case.images(torch.float32, CPU))
        assert case.too_far(ours, "eval/", case.tolerance("eval")) == {}, form
        ours = run(model.double(), case.images(torch.float64, CPU))
        assert case.too_far(ours, "eval64/", FLOAT64_TOLERANCE) == {}, form


def test_every_form_holds_the_same_bits(case: Case, imported: dict[str, Path]) -> None:
    states = {form: bsc.load_model(file).state_dict() for form, file in imported.items()}
    first, *others = states
    assert [form for form in others if not same_bits(states[form], states[first])] == []
    plain = case.directory / "weights_tf1_names.npz"
    if plain.exists():
        names = official_names(bsc.load_model(imported[first]))
        with np.load(plain) as arrays:
            assert set(names.values()) == set(arrays) - {"global_step"}
            stored = {ours: from_official(arrays[theirs]) for ours, theirs in names.items()}
        assert same_bits(states[first], stored)


def test_the_file_describes_the_network(case: Case, imported: dict[str, Path]) -> None:
    for form, file in imported.items():
        portable = read_model_file(file)
        assert portable.architecture == case.architecture, form
        assert portable.classes == tuple(map(str, range(case.architecture.classes or 0))), form
        cifar = case.architecture.backbone.stem == "cifar"
        assert portable.preprocessing.image_size == (32 if cifar else 224), form
        assert portable.preprocessing.eval_crop_proportion == (1 if cifar else 0.875), form
        assert portable.preprocessing.resize == ("tf1" if form == "tf1" else "tf2"), form
        assert portable.origin.endswith(" (TF1)" if form == "tf1" else " (TF2)"), form


def test_every_way_to_name_a_checkpoint(case: Case, tmp_path: Path) -> None:
    for form, folder in checkpoints(case.directory, tmp_path).items():
        prefix = find_checkpoint(folder)
        (shard,) = prefix.parent.glob(f"{prefix.name}.data-*")
        ways = [prefix, Path(f"{prefix}.index"), shard, prefix.parent]
        if form == "saved_model":
            ways.append(prefix.parent.parent)
        elif (prefix.parent / "checkpoint").exists():
            ways.append(prefix.parent / "checkpoint")
        expected = import_checkpoint(folder)
        assert expected.prefix == prefix
        for way in ways:
            found = import_checkpoint(way)
            assert found.prefix == prefix, way
            assert same_bits(
                found.portable.model.state_dict(), expected.portable.model.state_dict()
            ), way


def test_the_command_works_without_tensorflow(tmp_path: Path) -> None:
    case = min(map(read_case, CASES), key=lambda case: len(case.info["variables"]))
    (form, path), *_ = checkpoints(case.directory, tmp_path).items()
    np.save(tmp_path / "images.npy", case.images(torch.float32, CPU).numpy())
    arguments = [path, tmp_path / "network.safetensors", tmp_path / "logits.npy"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *arguments, tmp_path / "images.npy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"({form.upper()} names, checksums verified)" in done.stdout
    assert "tensors read again, each bit as in the checkpoint" in done.stdout
    error = relative_error(np.load(tmp_path / "logits.npy"), case.stored["eval/logits_sup"])
    assert error <= case.tolerance("eval")
