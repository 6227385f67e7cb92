import errno
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.data import build_data, count_examples
from bigsimclr.data.arrays import DIGITS, digits
from bigsimclr.errors import DataError
from bigsimclr.recipe.sources import ArraysData, DigitsData


def test_digits_are_grey_scans_over_the_whole_range() -> None:
    from sklearn.datasets import load_digits

    source = digits()
    scans = load_digits()
    assert len(source) == DIGITS
    assert source.images.shape == (DIGITS, 8, 8, 3)
    assert source.images.dtype == np.uint8
    assert np.array_equal(source.images[..., 0], source.images[..., 2])
    assert np.array_equal(np.rint(source.images[..., 1] / 255 * 16), scans.images)
    assert np.array_equal(source.labels, scans.target)
    assert source.classes == tuple("0123456789")


def test_digits_hold_out_the_same_share_of_every_class() -> None:
    splits = build_data(DigitsData(kind="digits"))
    assert splits.held_out is not None
    assert count_examples(DigitsData(kind="digits")) == (1437, 360)
    assert (len(splits.train), len(splits.held_out)) == (1437, 360)
    whole = np.bincount(digits().labels)
    apart = np.bincount(splits.held_out.labels)
    assert np.abs(apart - 0.2 * whole).max() < 1
    names = {splits.train.name(index) for index in range(1437)}
    names |= {splits.held_out.name(index) for index in range(360)}
    assert len(names) == DIGITS


def test_a_split_depends_on_its_seed_alone() -> None:
    first = build_data(DigitsData(kind="digits"))
    again = build_data(DigitsData(kind="digits"))
    other = build_data(DigitsData(kind="digits", split_seed=1))
    assert first.train.fingerprint == again.train.fingerprint
    assert first.train.fingerprint != other.train.fingerprint
    nothing = DigitsData(kind="digits", held_out_fraction=0.0)
    assert build_data(nothing).held_out is None
    assert count_examples(nothing) == (DIGITS, 0)


def test_names_and_labels_follow_their_images() -> None:
    whole, part = digits(), digits().take(np.array([7, 3, 1000]))
    assert [part.name(row) for row in range(3)] == ["digit-000007", "digit-000003", "digit-001000"]
    sample = part.read(2)
    assert isinstance(sample.image, np.ndarray)
    assert np.array_equal(sample.image, whole.images[1000])
    assert sample.label == whole.labels[1000]
    assert np.array_equal(part.read_many(np.array([1, 1]))[0], whole.images[3])


def test_arrays_are_read_grey_or_in_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 5, 6), dtype=np.uint8)
    labels = np.arange(20, dtype=np.int32) % 3 - 1
    np.savez(tmp_path / "grey.npz", images=grey, labels=labels)
    section = ArraysData(kind="arrays", root=tmp_path / "grey.npz", held_out_fraction=0.3)
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (len(splits.train), len(splits.held_out)) == (14, 6)
    assert splits.train.classes == ("0", "1")
    assert splits.train.image_size == (5, 6)
    number = int(splits.train.name(0).removeprefix("grey-"))
    sample = splits.train.read(0)
    assert isinstance(sample.image, np.ndarray)
    assert np.array_equal(sample.image, np.repeat(grey[number][..., None], 3, axis=2))

    np.savez(tmp_path / "colour.npz", images=rng.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8))
    bare = build_data(ArraysData(kind="arrays", root=tmp_path / "colour.npz"))
    assert bare.train.classes == ()
    assert bare.train.labels.tolist() == [-1] * 4


BOTH = pytest.mark.parametrize("open_images", [build_data, count_examples])
OBJECTS = np.array([None, {}], dtype=object)


@BOTH
@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, r"`images` is float32 \[2, 4, 4, 3\]; it"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "at least one image"),
        ({"images": np.zeros((), np.uint8)}, r"`images` is uint8 \[\]"),
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "no array `images`; it holds pictures$"),
        ({}, "no array `images`; it holds nothing$"),
        ({"images": OBJECTS}, "`images` holds pickled Python objects; they are never read"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": OBJECTS},
            "`labels` holds pickled Python objects; they are never read",
        ),
    ],
)
def test_arrays_of_another_kind_are_refused(
    tmp_path: Path,
    arrays: dict[str, np.ndarray],
    text: str,
    open_images: Callable[[ArraysData], object],
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=rf"^data\.root: \S+x\.npz.*{text}"):
        open_images(ArraysData(kind="arrays", root=path))


@BOTH
@pytest.mark.parametrize("labels", [np.zeros(3, np.int64), np.zeros(2, np.float64)])
def test_labels_must_fit_the_images(
    tmp_path: Path, labels: np.ndarray, open_images: Callable[[ArraysData], object]
) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), labels=labels)
    with pytest.raises(DataError, match=r"`labels` is .*; it must be whole numbers \[2\]"):
        open_images(ArraysData(kind="arrays", root=tmp_path / "x.npz"))


@BOTH
def test_files_that_are_no_arrays_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_images: Callable[[ArraysData], object]
) -> None:
    def refused(name: str, text: str) -> None:
        with pytest.raises(DataError, match=text):
            open_images(ArraysData(kind="arrays", root=Path(name)))

    monkeypatch.chdir(tmp_path)
    Path("classes.csv").write_text("name,class\n")
    Path("empty.npz").touch()
    np.save("one.npy", np.zeros((2, 4, 4), np.uint8))
    np.save("pickled.npy", OBJECTS)
    for name in ("classes.csv", "empty.npz", "one.npy", "pickled.npy"):
        refused(
            name, rf"^data\.root: {name} is not a \.npz file; write one with numpy\.savez\(FILE,"
        )
    Path("set").mkdir()
    refused("set", r"^data\.root: set is a folder, not a file; data\.kind=folder reads folders")
    refused(
        "none.npz",
        r"^data\.root: none\.npz does not exist \(relative to the current directory\);"
        r" give the \.npz file with data\.root=FILE$",
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez("good.npz", images=np.zeros((2, 4, 4), np.uint8))
    open_images(ArraysData(kind="arrays", root=Path("~/good.npz")))


@BOTH
def test_a_failing_disk_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_images: Callable[[ArraysData], object]
) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8))
    monkeypatch.setattr(zipfile.ZipFile, "open", failing)
    with pytest.raises(DataError, match=r"^data\.root: \S+x\.npz: Input/output error$"):
        open_images(ArraysData(kind="arrays", root=tmp_path / "x.npz"))


def test_damaged_arrays_are_refused_without_foreign_text(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 40), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(path, images=images)
        whole = path.read_bytes()
        for place in (len(whole) // 2, len(whole) // 3):
            content = bytearray(whole)
            content[place : place + 8] = bytes(8)
            path.write_bytes(content)
            with pytest.raises(
                DataError, match=r"x\.npz is damaged: `images` cannot be read; write"
            ):
                build_data(ArraysData(kind="arrays", root=path))
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"is not a \.npz file"):
            build_data(ArraysData(kind="arrays", root=path))


@pytest.mark.parametrize("version", [(1, 0), (9, 9)])
def test_a_header_that_promises_too_much_is_refused(
    tmp_path: Path, version: tuple[int, int]
) -> None:
    stream = io.BytesIO()
    promised = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)}
    np.lib.format.write_array_header_1_0(stream, promised)
    content = stream.getvalue()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", content[:6] + bytes(version) + content[8:] + bytes(64))
    with pytest.raises(DataError, match="is damaged: `images`"):
        count_examples(ArraysData(kind="arrays", root=tmp_path / "x.npz"))


def test_counting_loads_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys; from bigsimclr.data import count_examples;"
        "from bigsimclr.recipe.sources import DigitsData;"
        "count_examples(DigitsData(kind='digits'));"
        "assert not {'torch', 'sklearn', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
