import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.data import build_data, count_examples
from bigsimclr.data.folder import read_regular, training_folder
from bigsimclr.errors import DataError
from bigsimclr.recipe.sources import FolderData
from tests.data.conftest import Encode


def test_first_sub_folders_are_classes(class_folder: Path) -> None:
    section = FolderData(kind="folder", root=class_folder)
    source = build_data(section).train
    assert count_examples(section) == (12, 0)
    assert source.classes == ("class_0", "class_1", "class_2")
    assert [source.name(index) for index in (0, 3, 4)] == [
        "class_0/00.png",
        "class_0/09.png",
        "class_1/01.png",
    ]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    sample = source.read(4)
    assert sample.image == (class_folder / "class_1/01.png").read_bytes()
    assert (sample.label, sample.index) == (1, 4)


def test_a_share_can_be_held_out(class_folder: Path) -> None:
    section = FolderData(kind="folder", root=class_folder, held_out_fraction=0.25)
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (9, 3)
    assert splits.held_out.labels.tolist() == [0, 1, 2]
    assert splits.held_out.classes == splits.train.classes
    both = [splits.train.name(i) for i in range(9)] + [splits.held_out.name(i) for i in range(3)]
    assert len(set(both)) == 12


def test_held_out_folders_use_the_training_classes(class_folder: Path) -> None:
    root = class_folder.parent
    (root / "val" / "class_2").mkdir(parents=True)
    os.link(class_folder / "class_2/02.png", root / "val/class_2/x.png")
    section = FolderData(kind="folder", root=root, train="set", held_out="val")
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (12, 1)
    assert splits.held_out.labels.tolist() == [2]
    (root / "val" / "bird").mkdir()
    os.link(class_folder / "class_2/02.png", root / "val/bird/x.png")
    with pytest.raises(
        DataError, match=r"^data\.held_out: .* 1 class without training images: bird"
    ):
        build_data(section)


def test_overlapping_folders_are_refused(class_folder: Path) -> None:
    section = FolderData(kind="folder", root=class_folder, held_out="class_1")
    with pytest.raises(DataError, match="overlap"):
        build_data(section)


def test_unlabelled_folders_nest_as_they_like(class_folder: Path, png: Encode) -> None:
    (class_folder / "class_0/deep/deeper").mkdir(parents=True)
    image = png(np.zeros((2, 2, 3), np.uint8))
    (class_folder / "class_0/deep/deeper/A.JPeG").write_bytes(image)
    (class_folder / "beside.png").write_bytes(image)
    section = FolderData(kind="folder", root=class_folder, labelled=False)
    source = build_data(section).train
    assert len(source) == 14
    assert source.classes == ()
    assert set(source.labels.tolist()) == {-1}
    with pytest.raises(
        DataError, match=r"1 image lies beside the class folders: beside\.png; move it"
    ):
        build_data(FolderData(kind="folder", root=class_folder))


def test_a_flat_folder_has_no_labels(class_folder: Path) -> None:
    source = training_folder(class_folder, "class_0", labelled=True)
    assert source.classes == ()
    assert source.labels.tolist() == [-1] * 4


def test_hidden_and_other_files_do_not_count(class_folder: Path, png: Encode) -> None:
    before = training_folder(class_folder, ".", labelled=True).fingerprint
    image = png(np.zeros((2, 2, 3), np.uint8))
    (class_folder / ".trash").mkdir()
    for name in (".trash/a.png", "class_0/.a.png", "class_0/notes.txt", "class_0/png"):
        (class_folder / name).write_bytes(image)
    assert training_folder(class_folder, ".", labelled=True).fingerprint == before


@pytest.mark.parametrize("change", ["add", "remove", "rename", "size"])
def test_the_fingerprint_notices_changes(class_folder: Path, change: str) -> None:
    before = training_folder(class_folder, ".", labelled=True).fingerprint
    path = class_folder / "class_0/00.png"
    match change:
        case "add":
            (class_folder / "class_0/99.png").write_bytes(b"x")
        case "remove":
            path.unlink()
        case "rename":
            path.rename(class_folder / "class_1/00.png")
        case _:
            path.write_bytes(path.read_bytes() + b"x")
    assert training_folder(class_folder, ".", labelled=True).fingerprint != before


def test_an_empty_folder_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.dcm", "c.DCM", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    section = FolderData(kind="folder", root=tmp_path)
    with pytest.raises(DataError, match=r"holds 0 images .*\.jpg.*3 x \.dcm, 1 x \.txt"):
        count_examples(section)


@pytest.mark.parametrize("open_images", [build_data, count_examples])
def test_a_folder_that_is_none_names_its_key(
    class_folder: Path, monkeypatch: pytest.MonkeyPatch, open_images: Callable[..., object]
) -> None:
    def section(**keys: object) -> FolderData:
        keys["root"] = Path(str(keys["root"]))
        return FolderData.model_validate({"kind": "folder", **keys})

    monkeypatch.chdir(class_folder.parent)
    with pytest.raises(
        DataError,
        match=r"^data\.root: none does not exist \(relative to the current directory\);"
        r" give the folder of the images with data\.root=DIR$",
    ):
        open_images(section(root="none"))
    with pytest.raises(DataError, match=r"^data\.root: /none/x does not exist; give"):
        open_images(section(root="/none/x"))
    with pytest.raises(DataError, match=r"^data\.root: \S+00\.png is a file, not a folder; give"):
        open_images(section(root=class_folder / "class_0/00.png"))
    with pytest.raises(
        DataError,
        match=r"^data\.train: set/trian does not .*; set holds class_0, class_1, class_2$",
    ):
        open_images(section(root="set", train="trian"))
    with pytest.raises(DataError, match=r"^data\.held_out: set/val does not exist"):
        open_images(section(root="set", train="class_0", held_out="val"))
    monkeypatch.setenv("HOME", str(class_folder.parent))
    open_images(section(root="~/set"))
    with pytest.raises(DataError, match=r"^data\.root: ~nobody_here/x: there is no such home$"):
        open_images(section(root="~nobody_here/x"))


def test_messages_name_no_key_where_no_recipe_is_meant() -> None:
    with pytest.raises(
        DataError, match=r"^none does not exist \(relative to the current dir\w+\)$"
    ):
        training_folder(Path("none"), ".", labelled=False, root_key="")


@pytest.mark.parametrize("open_images", [build_data, count_examples])
def test_class_folders_without_images_are_named(
    class_folder: Path, open_images: Callable[..., object]
) -> None:
    (class_folder / "bird").mkdir()
    with pytest.raises(
        DataError,
        match=r"^data\.root: \S+/set: 1 class folder without an image of its own: bird;"
        r" put images there, or remove it$",
    ):
        open_images(FolderData(kind="folder", root=class_folder))
    (class_folder / "again").symlink_to(class_folder / "class_0")
    (class_folder / "bird/notes.txt").write_text("none yet")
    with pytest.raises(DataError, match="2 class folders without an image of their own: again, b"):
        open_images(FolderData(kind="folder", root=class_folder))
    open_images(FolderData(kind="folder", root=class_folder, labelled=False))
    (class_folder / "class_1/empty").mkdir()
    open_images(FolderData(kind="folder", root=class_folder, train="class_1"))


def test_links_and_pipes_neither_loop_nor_hang(
    class_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (class_folder / "class_0/up").symlink_to(class_folder)
    (class_folder / "class_0/self").symlink_to(class_folder / "class_0")
    (class_folder / "class_0/broken.png").symlink_to(class_folder / "nothing.png")
    os.mkfifo(class_folder / "class_1/pipe.png")
    assert len(training_folder(class_folder, ".", labelled=True)) == 12
    assert "2 entries have names of images, are not files, and are left out: " in caplog.text
    assert "class_1/pipe.png" in caplog.text
    with pytest.raises(DataError, match="not a regular file"):
        read_regular(class_folder / "class_1/pipe.png")


def test_links_to_files_are_followed(class_folder: Path) -> None:
    (class_folder / "class_0/link.png").symlink_to(class_folder / "class_1/01.png")
    source = training_folder(class_folder, ".", labelled=True)
    assert source.labels.tolist().count(0) == 5


def test_messages_carry_no_control_characters(tmp_path: Path) -> None:
    evil = tmp_path / "x\x1b]0;y\x07"
    evil.mkdir()
    with pytest.raises(DataError) as raised:
        training_folder(evil, ".", labelled=True)
    assert "\x1b" not in str(raised.value)
    assert "x\\x1b]0;y\\x07" in str(raised.value)


def test_names_that_are_not_utf8_are_read(tmp_path: Path, png: Encode) -> None:
    image = png(np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "a").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "a") + b"/\xff\n.png")).write_bytes(image)
    source = training_folder(tmp_path, ".", labelled=True)
    assert source.read(0).image == image
