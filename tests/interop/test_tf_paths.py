"""A checkpoint is found by its prefix, a file, a list or a folder; else it is said why not."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_checkpoint import find_checkpoint, import_checkpoint
from tests.interop.write_bundle import write_bundle

NAME = "model.ckpt-250228"
ONE = {"a": np.ones(3, "float32")}  # no network: only names are looked at


def listing(name: str) -> str:
    return f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'


def test_several_checkpoints(tmp_path: Path) -> None:
    for number in (1, 20, 3, 400, 5):
        write_bundle(tmp_path / f"model.ckpt-{number}", ONE)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)
    assert str(caught.value).endswith(
        "holds several checkpoints; name one: model.ckpt-1, model.ckpt-20, model.ckpt-3 and 2 more"
    )
    (tmp_path / "checkpoint").write_text(listing("model.ckpt-20"))
    assert find_checkpoint(tmp_path) == tmp_path / "model.ckpt-20"
    assert find_checkpoint(tmp_path / "model.ckpt-3") == tmp_path / "model.ckpt-3"
    assert find_checkpoint(tmp_path / "model.ckpt-3.index") == tmp_path / "model.ckpt-3"
    shard = tmp_path / "model.ckpt-3.data-00000-of-00001"
    assert find_checkpoint(shard) == tmp_path / "model.ckpt-3"


@pytest.mark.parametrize(
    "name",
    [
        "/cns/of/another/machine/model.ckpt-7",
        "gs://bucket/simclr/model.ckpt-7",
        "C:\\\\Users\\\\me\\\\model.ckpt-7",
        "model.ckpt-7",
    ],
)
def test_the_list_may_be_of_another_machine(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / "model.ckpt-7", ONE)
    write_bundle(tmp_path / "model.ckpt-8", ONE)
    (tmp_path / "checkpoint").write_text(listing(name))
    assert find_checkpoint(tmp_path) == tmp_path / "model.ckpt-7"
    assert find_checkpoint(tmp_path / "checkpoint") == tmp_path / "model.ckpt-7"


def test_a_list_of_what_is_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_bundle(tmp_path / "run" / NAME, ONE)
    (tmp_path / "checkpoint").write_text(listing(f"run/{NAME}"))
    assert find_checkpoint(tmp_path) == tmp_path / "run" / NAME
    (tmp_path / "checkpoint").write_text(listing("gone/model.ckpt-1"))
    with pytest.raises(CheckpointError, match=r"names 'model\.ckpt-1', which is not beside it"):
        find_checkpoint(tmp_path)
    for text in ("", 'all_model_checkpoint_paths: "x"', "\0\xff" * 100):
        (tmp_path / "checkpoint").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match="names no model_checkpoint_path"):
            find_checkpoint(tmp_path)


def test_folders_are_searched(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep.parent / "other.txt").touch()
    write_bundle(deep / NAME, ONE)
    assert find_checkpoint(tmp_path) == deep / NAME
    shutil.move(deep, tmp_path / "a" / "d")
    (tmp_path / "a" / "d" / "e").mkdir()
    assert find_checkpoint(tmp_path / "a") == tmp_path / "a" / "d" / NAME


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("model.zip", "model.tar.gz", "saved_model.pb", "weights.pth"):
        (tmp_path / name).touch()
    for path, text in {
        tmp_path: "holds no TensorFlow checkpoint (no .index file, 3 folders down)",
        tmp_path / "gone": f"is no file, no folder, and no checkpoint ({tmp_path / 'gone'}.index)",
        tmp_path / "model.zip": "is an archive; unpack it",
        tmp_path / "model.tar.gz": "is an archive; unpack it",
        tmp_path / "saved_model.pb": f"holds no weights; name its folder, {tmp_path}",
        tmp_path / "weights.pth": "is no part of a TensorFlow checkpoint",
        Path("\0"): "is no file",
        tmp_path / ("long" * 100): "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(text)):
            find_checkpoint(path)


def test_a_shard_without_its_index(tmp_path: Path) -> None:
    write_bundle(tmp_path / NAME, ONE)
    Path(f"{tmp_path / NAME}.index").unlink()
    with pytest.raises(CheckpointError, match=r"\.index is missing"):
        import_checkpoint(tmp_path / f"{NAME}.data-00000-of-00001")
