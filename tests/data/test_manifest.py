import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigsimclr.cli import app
from bigsimclr.data import build_data, count_examples
from bigsimclr.data.listing import walk_folder
from bigsimclr.data.manifest import write_manifest
from bigsimclr.errors import DataError
from bigsimclr.recipe.sources import FolderData


@pytest.fixture
def root(class_folder: Path) -> Path:
    """The class folder as it is long after its last change, with a held-out part."""
    shutil.copytree(class_folder, class_folder.parent / "both/train")
    shutil.copytree(class_folder / "class_1", class_folder.parent / "both/val/class_1")
    settle(class_folder.parent / "both")
    return class_folder.parent / "both"


def settle(root: Path) -> None:
    """Age all folders, so that their times say whether they changed."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, (10**9, 10**9))


def section(root: Path, **keys: object) -> FolderData:
    given = {"kind": "folder", "train": "train", "held_out": "val", **keys}
    return FolderData.model_validate({"root": root, **given})


def test_a_manifest_gives_what_walking_gives(root: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.json"
    assert len(write_manifest(root, manifest).names) == 16
    for keys in ({}, {"train": "./train/"}, {"train": "train/class_1", "held_out": "val/class_1"}):
        walked = build_data(section(root, **keys))
        listed = build_data(section(root, **keys, manifest=manifest))
        assert listed.train.fingerprint == walked.train.fingerprint
        assert listed.train.classes == walked.train.classes
        assert listed.held_out is not None
        assert walked.held_out is not None
        assert listed.held_out.fingerprint == walked.held_out.fingerprint
        assert listed.train.read(3) == walked.train.read(3)
        assert count_examples(section(root, **keys, manifest=manifest)) == (
            len(walked.train),
            len(walked.held_out),
        )
    flat = section(root, train=".", held_out=None, labelled=False)
    again = flat.model_copy(update={"manifest": manifest})
    assert build_data(again).train.fingerprint == build_data(flat).train.fingerprint


def test_an_unchanged_folder_is_not_walked_through(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "list.json"
    write_manifest(root, manifest)
    with monkeypatch.context() as patch:
        patch.setattr("bigsimclr.data.manifest.walk_folder", lambda *_: pytest.fail("walked"))
        assert len(build_data(section(root, manifest=manifest)).train) == 12
    # A copy has other times, and the same images.
    shutil.copytree(root, tmp_path / "copy")
    assert len(build_data(section(tmp_path / "copy", manifest=manifest)).train) == 12


def test_what_changed_is_told(root: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.json"
    write_manifest(root, manifest)
    (root / "train/class_0/new.png").write_bytes(b"x")
    (root / "train/class_0/newer.png").write_bytes(b"x")
    (root / "train/class_2/02.png").unlink()
    (root / "train/class_1/01.png").write_bytes(b"x")
    with pytest.raises(
        DataError,
        match=r"^data\.manifest: \S+list\.json is out of date: of 12 images,"
        r" 2 new \(class_0/new\.png, class_0/newer\.png\), 1 gone \(class_2/02\.png\),"
        r" 1 of another size \(class_1/01\.png\); write it again with: bigsimclr data index \S+",
    ):
        build_data(section(root, manifest=manifest))
    write_manifest(root, manifest)
    assert len(build_data(section(root, manifest=manifest)).train) == 13
    shutil.rmtree(root / "train/class_2")
    with pytest.raises(DataError, match=r"of 13 images, 3 gone \(class_2/05\.png"):
        build_data(section(root, manifest=manifest))


def test_a_change_within_the_same_moment_is_noticed(root: Path, tmp_path: Path) -> None:
    (root / "train/class_0/first.png").write_bytes(b"x")
    manifest = tmp_path / "list.json"
    write_manifest(root, manifest)
    folder = root / "train/class_0"
    before = folder.stat().st_mtime_ns
    (folder / "second.png").write_bytes(b"x")
    os.utime(folder, ns=(before, before))
    with pytest.raises(DataError, match=r"1 new \(class_0/second\.png\)"):
        build_data(section(root, manifest=manifest))


def test_a_file_of_another_size_is_not_read(root: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.json"
    write_manifest(root, manifest)
    path = root / "train/class_0/00.png"
    size = path.stat().st_size
    path.write_bytes(b"short")  # leaves its folder as it was
    source = build_data(section(root, manifest=manifest)).train
    with pytest.raises(DataError, match=rf"has 5 bytes, and had {size} when it was listed"):
        source.read(0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda _: "[]",
        lambda text: text[:-30],
        lambda text: text.replace("manifest 1", "manifest 2"),
        lambda text: text.replace("00.png", "0x.png", 1),
        lambda text: text.replace('"sizes": [', '"sizes": [1, '),
        lambda text: text.replace('"folders": {', '"folders": {"../..": 0, '),
        lambda text: text.replace('"folders": {', '"folders": ['),
        lambda _: "[" * 99_999,
    ],
)
def test_a_damaged_manifest_is_refused(
    root: Path, tmp_path: Path, spoil: Callable[[str], str]
) -> None:
    manifest = tmp_path / "list.json"
    write_manifest(root, manifest)
    text = manifest.read_text(encoding="utf-8")
    assert spoil(text) != text
    manifest.write_text(spoil(text), encoding="utf-8")
    with pytest.raises(DataError, match=r"^data\.manifest: \S+ is not a manifest, or is damaged;"):
        build_data(section(root, manifest=manifest))


def test_a_manifest_names_nothing_outside(root: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.json"
    write_manifest(root, manifest)
    content = json.loads(manifest.read_text(encoding="utf-8"))
    for folder in ("../both/train", "/train"):
        with pytest.raises(DataError, match=r"is not below|does not exist"):
            build_data(section(root, manifest=manifest, train=folder))
    content["names"][0] = "../x.png"
    from bigsimclr.data.names import fingerprint

    sizes = walk_folder(root, "").sizes.tobytes()
    content["fingerprint"] = fingerprint([*map(os.fsencode, content["names"]), sizes])
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is damaged"):
        build_data(section(root, manifest=manifest))
    with pytest.raises(DataError, match=r"none\.json does not exist; write it with: bigsimclr"):
        build_data(section(root, manifest=tmp_path / "none.json"))
    (root / "empty").mkdir()
    write_manifest(root, manifest)
    with pytest.raises(DataError, match="lists no image below empty"):
        build_data(section(root, manifest=manifest, train="empty"))


def test_a_folder_that_changed_just_now_is_told(root: Path, tmp_path: Path) -> None:
    words = ["data", "index", str(root), "--out", str(tmp_path / "list.json")]
    settled = CliRunner().invoke(app, words)
    assert (settled.exit_code, settled.stderr) == (0, "")
    os.utime(root / "train")
    early = CliRunner().invoke(app, words)
    assert early.exit_code == 0
    assert early.stderr.startswith("folders changed within the last seconds; run this again")
