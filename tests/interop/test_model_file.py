"""A network in one file: the same network back, or one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigsimclr.errors import CheckpointError, RecipeError, StorageError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.interop.model_file import read_model_file, write_model_file
from bigsimclr.models import Architecture, build_model
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone

ARCHITECTURE = Architecture(
    backbone=ResNetBackbone(depth=50, width=1 / 16, selective_kernel=True),
    head=HeadSection(layers=3, output_width=8),
    classes=3,
    from_layer=1,
    keep_head_layers=2,
)


@pytest.fixture
def portable() -> PortableModel:
    model = build_model(ARCHITECTURE, seed=3).eval()
    for number, buffer in enumerate(model.buffers()):
        buffer.add_(0.1 * number)
    prepared = Preprocessing(image_size=64, resize="tf1", eval_crop_proportion=0.875)
    return PortableModel(model, ARCHITECTURE, ("cat", "dog", "é\n"), prepared, "a test")


def test_the_same_network_comes_back(tmp_path: Path, portable: PortableModel) -> None:
    write_model_file(tmp_path / "m.safetensors", portable)
    found = read_model_file(tmp_path / "m.safetensors")
    assert found.architecture == ARCHITECTURE
    assert found.classes == portable.classes
    assert found.preprocessing == portable.preprocessing
    assert found.origin == "a test"
    assert not found.model.training
    before = portable.model.state_dict()
    assert found.model.state_dict().keys() == before.keys()
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found.model(images).logits, portable.model(images).logits)


def test_files_are_written_once_and_by_their_name(tmp_path: Path, portable: PortableModel) -> None:
    file = tmp_path / "m.safetensors"
    write_model_file(file, portable)
    with pytest.raises(StorageError, match="exists already"):
        write_model_file(file, portable)
    with pytest.raises(RecipeError, match=r"m\.pt: a \.safetensors file is written"):
        write_model_file(tmp_path / "m.pt", portable)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def read_or_refusal(file: Path) -> PortableModel | str:
    try:
        return read_model_file(file)
    except CheckpointError as error:
        return str(error)


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    program = f"""
import resource, torch
from pathlib import Path
from bigsimclr.interop.model_file import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_tensors(Path({str(file)!r}), {{"big": torch.zeros(250_000)}}, {{}})
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"StorageError: {file} cannot be written: " in done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_changed_files_are_refused(tmp_path: Path, portable: PortableModel) -> None:
    file = tmp_path / "m.safetensors"
    write_model_file(file, portable)
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    places = [*generator.integers(0, len(content), 60), *generator.integers(0, header, 60)]
    before = portable.model.state_dict()
    unchanged = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(0, 8))
        if generator.random() < 0.2:
            changed = changed[:place]
        file.write_bytes(changed)
        outcome = read_or_refusal(file)
        if isinstance(outcome, PortableModel):
            unchanged += 1  # a letter of the origin, say
            for name, tensor in outcome.model.state_dict().items():
                assert torch.equal(tensor, before[name])
        else:
            assert outcome.startswith(str(file))
            assert "\n" not in outcome
    assert unchanged < 20


def test_other_files_are_named(tmp_path: Path, portable: PortableModel) -> None:
    with pytest.raises(CheckpointError, match="is no file"):
        read_model_file(tmp_path / "none.safetensors")
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="damaged or no safetensors"):
        read_model_file(tmp_path / "empty")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="does not describe its network"):
        read_model_file(foreign)


def test_a_description_of_another_network_is_refused(
    tmp_path: Path, portable: PortableModel
) -> None:
    file = tmp_path / "m.safetensors"
    write_model_file(file, portable)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for key, value in (
        ("architecture", ARCHITECTURE.to_json().replace('"depth":50', '"depth":34')),
        ("architecture", "{}"),
        ("classes", "7"),
        ("classes", '["cat", "dog"]'),
        ("preprocessing", '{"image_size": 64}'),
    ):
        other = tmp_path / "other.safetensors"
        save_file(load_file(file), other, {**header["__metadata__"], key: value})
        with pytest.raises(CheckpointError, match="does not describe its own weights"):
            read_model_file(other)
