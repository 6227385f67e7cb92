import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bigsimclr.cli import app
from bigsimclr.cli.findings import scan_text
from bigsimclr.data import Sample, Source, Splits, build_data
from bigsimclr.data.alike import close_pairs, look_of
from bigsimclr.data.arrays import ArraySource
from bigsimclr.data.folder import found_folder, training_folder
from bigsimclr.data.manifest import write_manifest
from bigsimclr.data.pack import pack
from bigsimclr.data.scan import Broken, Copy, scan
from bigsimclr.errors import DataError
from bigsimclr.recipe.sources import DigitsData, FolderData, MixData, ShardsData
from tests.data.test_alike import photograph

LIMIT = 1_000_000


def saved(path: Path, seed: int, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photograph(seed, side=40)).save(stream, kind, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue())
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Training and held-out photographs with every kind of copy, and one broken file."""
    root = tmp_path / "photos"
    for number in range(6):
        saved(root / f"train/{'cat' if number < 3 else 'dog'}/{number}.png", number)
    saved(root / "train/dog/z_copy.png", 0)
    saved(root / "train/dog/z_smaller.jpg", 4, "JPEG", quality=60)
    saved(root / "val/cat/new.png", 20)
    saved(root / "val/cat/same.png", 2)
    saved(root / "val/dog/resaved.jpg", 5, "JPEG", quality=60)
    saved(root / "val/dog/twice.png", 21)
    saved(root / "val/dog/twice_again.png", 21)
    (root / "val/dog/broken.png").write_bytes(b"")
    return root


def test_copies_and_leaks_are_found_by_bytes_and_by_look(photos: Path) -> None:
    found = scan(found_folder(photos), max_pixels=LIMIT)
    assert found.copies == (Copy("dog/z_copy.png", "cat/0.png", None, is_same_class=False),)
    assert [(copy.name, copy.of) for copy in found.alike] == [("dog/z_smaller.jpg", "dog/4.png")]
    assert found.leaks == (Copy("cat/same.png", "cat/2.png", None, is_same_class=True),)
    (alike,) = found.leaks_alike
    assert (alike.name, alike.of, alike.is_same_class) == ("dog/resaved.jpg", "dog/5.png", True)
    assert alike.bits is not None
    assert alike.bits <= 4
    assert found.broken == (Broken("held out", "dog/broken.png", "empty file"),)
    assert found.train.classes == {"cat": 3, "dog": 5}
    assert found.held_out is not None
    assert found.held_out.classes == {"cat": 2, "dog": 4}
    assert found.train.bytes == sum(path.stat().st_size for path in photos.glob("train/*/*"))
    assert not found.is_clean


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_processes_changes_nothing(photos: Path, workers: int) -> None:
    splits = found_folder(photos)
    assert scan(splits, max_pixels=LIMIT, workers=workers) == scan(splits, max_pixels=LIMIT)


def test_recipes_are_scanned_as_they_split(photos: Path) -> None:
    section = FolderData(kind="folder", root=photos, train="train", held_out_fraction=0.25)
    splits = build_data(section)
    found = scan(splits, max_pixels=LIMIT)
    names = [splits.train.name(index) for index in range(len(splits.train))]
    assert found.train.images == 6
    assert found.held_out is not None
    assert found.held_out.images == 2
    for copy in (*found.copies, *found.leaks):
        assert copy.of in names
    assert len(found.copies) + len(found.leaks) == 1
    assert len(found.alike) + len(found.leaks_alike) == 1


def test_arrays_are_compared_by_their_pixels() -> None:
    pixels = np.stack([photograph(seed, side=32) for seed in (1, 2, 3, 1)])
    source = ArraySource(pixels, np.array([0, 1, 2, 2]), classes=("a", "b", "c"))
    apart = ArraySource(pixels[[1]], np.array([1]), classes=("a", "b", "c"), prefix="other")
    found = scan(Splits(source, apart), max_pixels=LIMIT)
    assert found.copies == (Copy("image-000003", "image-000000", None, is_same_class=False),)
    assert found.leaks == (Copy("other-000000", "image-000001", None, is_same_class=True),)
    assert found.formats == {"array": 5}
    assert found.train.classes == {"a": 1, "b": 1, "c": 2}


def test_digests_that_share_their_beginning_are_different() -> None:
    pixels = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 1, 1, 0, 2)])
    found = scan(Splits(ArraySource(pixels), None), max_pixels=LIMIT)
    assert [(copy.name, copy.of) for copy in found.copies] == [
        ("image-000002", "image-000001"),
        ("image-000003", "image-000000"),
    ]
    assert len({hashlib.sha256(image.tobytes()).digest() for image in pixels}) == 3


class Deadly:
    """Array images of which some kill whoever reads them."""

    def __init__(self, whole: ArraySource, deadly: set[int]) -> None:
        self.whole, self.deadly = whole, deadly
        self.classes, self.labels = whole.classes, whole.labels
        self.fingerprint = whole.fingerprint
        self.image_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.whole)

    def name(self, index: int) -> str:
        return self.whole.name(index)

    def read(self, index: int) -> Sample:
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.whole.read(index)


def test_an_image_that_kills_its_reader_is_broken_and_the_scan_goes_on() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 20, 20, 3), dtype=np.uint8)
    whole = ArraySource(pixels)
    found = scan(Splits(Deadly(whole, {3, 70}), None), max_pixels=LIMIT, workers=2)
    reason = "ended 2 processes that read it, by SIGKILL"
    assert found.broken == tuple(
        Broken("train", name, reason) for name in ("image-000003", "image-000070")
    )
    assert found.modes == {"RGB": 88}


def invoke(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "scan", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_ends_with_3_and_says_why(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "findings.jsonl"
    code, text, told = invoke(str(photos), "--workers", "1", "--out", str(out))
    assert code == 3
    assert told == (
        "bigsimclr: error: 1 broken image and 2 held-out images among the training images;"
        f" listed in {out}\n"
    )
    lines = text.splitlines()
    assert "images      14: 8 for training, 6 held out" in lines
    assert "  dog/broken.png (held out): empty file" in lines
    assert "formats     11 PNG, 2 JPEG" in lines
    assert "width       50 to 50 pixels, median 50" in lines
    assert "classes     2, each 3 to 5 images (3 cat, 5 dog)" in lines
    assert (
        "copies      1 training images with the bytes of an earlier one (1 of another class)"
        in lines
    )
    findings = [json.loads(line) for line in out.read_text().splitlines()]
    assert [item["finding"] for item in findings] == [
        "broken",
        "copies",
        "alike",
        "leaks",
        "leaks_alike",
    ]
    assert findings[0] == {
        "finding": "broken",
        "part": "held out",
        "name": "dog/broken.png",
        "reason": "empty file",
    }
    # The place is tried before the work.
    assert invoke(str(photos), "--out", str(out))[:2] == (7, "")


def test_tar_files_are_shards_where_they_are_alone(photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    pack(training_folder(photos / "train", ".", labelled=True), tmp_path / "train")
    pack(training_folder(photos / "val" / "cat", ".", labelled=False), tmp_path / "val")
    shards.mkdir()
    for kind in ("train", "val"):
        for number, file in enumerate(sorted((tmp_path / kind).glob("*.tar"))):
            file.rename(shards / f"{kind}-{number}.tar")
    code, text, told = invoke(str(shards))
    assert (code, "images      10: 8 for training, 2 held out" in text) == (3, True)
    assert "1 held-out image among the training images" in told
    (shards / "val-0.tar").rename(photos / "backup.tar")
    assert "8 for training, none held out" in invoke(str(shards))[1]
    code, _, told = invoke(str(photos))
    assert code == 3
    assert told == (
        f"bigsimclr: error: {photos} holds .tar files, and other images or folders: name"
        f" '{photos}/*.tar', or move them elsewhere\n"
    )
    assert "2 for training, none held out" in invoke(f"{photos}/*.tar")[1]
    assert "2 for training, none held out" in invoke(str(photos / "backup.tar"))[1]


def test_a_home_that_does_not_exist_is_one_line() -> None:
    code, _, told = invoke("~nobodyhere/photographs")
    assert code == 3
    assert told == "bigsimclr: error: ~nobodyhere/photographs: there is no such home\n"


def test_the_command_ends_with_0_where_all_is_well(photos: Path) -> None:
    code, text, told = invoke(str(photos / "train"))
    assert (code, told) == (0, "")
    assert "leaks" not in text
    for name in ("same.png", "resaved.jpg", "broken.png"):
        next(photos.glob(f"val/*/{name}")).unlink()
    code, text, told = invoke(str(photos), "--json", "--bits", "2")
    assert (code, told) == (0, "")
    assert json.loads(text)["is_clean"] is True
    assert json.loads(text)["held_out"]["images"] == 3


def test_recipes_and_their_keys_are_taken(photos: Path) -> None:
    keys = ["data.kind=folder", f"data.root={photos}", "data.train=train", "data.held_out=val"]
    code, text, _ = invoke("digits/1_pretrain", *keys, "augment.image_size=16", "--show", "0")
    assert code == 3
    assert "14: 8 for training, 6 held out" in text
    assert "z_copy" not in text
    code, text, _ = invoke("digits")
    assert code == 0
    assert "1,797: 1,437 for training, 360 held out" in text
    code, _, told = invoke(str(photos), "data.labelled=false")
    assert code == 2
    assert "is no recipe and has no keys to change" in told


@pytest.fixture
def odd(photos: Path) -> Path:
    """Training photographs with a broken one, a copy, and a link to nothing."""
    (photos / "train/cat/broken.png").write_bytes(b"")
    (photos / "train/cat/link.png").symlink_to(photos / "nothing")
    return photos / "train"


LINK = Broken("train", "cat/link.png", "a link to nothing")


def test_shards_hold_what_their_folder_held(odd: Path, tmp_path: Path) -> None:
    pack(training_folder(odd, ".", labelled=True), tmp_path / "pack", shard_bytes=5_000)
    files = scan(found_folder(odd), max_pixels=LIMIT)
    assert files.broken == (LINK, Broken("train", "cat/broken.png", "empty file"))
    section = ShardsData(kind="shards", root=tmp_path / "pack")
    for workers in (0, 2):
        packed = scan(build_data(section), max_pixels=LIMIT, workers=workers)
        assert packed == replace(files, broken=files.broken[1:])
    code, text, told = invoke(str(tmp_path / "pack"))
    assert code == 3
    assert "cat/broken.png: empty file" in text
    assert told == "bigsimclr: error: 1 broken image\n"


def test_a_damaged_shard_ends_the_scan_by_its_name(odd: Path, tmp_path: Path) -> None:
    pack(training_folder(odd, ".", labelled=True), tmp_path / "pack", shard_bytes=5_000)
    shard = min((tmp_path / "pack").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    code, _, told = invoke(str(tmp_path / "pack"))
    assert code == 3
    assert shard.name in told
    assert "Traceback" not in told


def test_a_manifest_keeps_what_was_left_out(odd: Path, tmp_path: Path) -> None:
    write_manifest(odd.parent, tmp_path / "list.json")
    keys = {"kind": "folder", "root": odd.parent, "train": "train", "held_out": "val"}
    walked = scan(build_data(FolderData.model_validate(keys)), max_pixels=LIMIT)
    keys["manifest"] = tmp_path / "list.json"
    assert scan(build_data(FolderData.model_validate(keys)), max_pixels=LIMIT) == walked
    assert walked.broken[0] == LINK


def test_mixtures_are_scanned_as_one(odd: Path, tmp_path: Path) -> None:
    pack(training_folder(odd, ".", labelled=True), tmp_path / "pack")
    parts = (
        {"kind": "folder", "root": odd, "held_out_fraction": 0.4},
        {"kind": "shards", "root": tmp_path / "pack"},
    )
    sources = tuple({"data": part} for part in parts)
    splits = build_data(MixData.model_validate({"kind": "mix", "sources": sources}))
    assert splits.held_out is not None
    found = scan(splits, max_pixels=LIMIT)
    assert found.train.images + len(splits.held_out) == 18
    # Named by their source's number, since both sources have these names; the link once.
    reasons = Counter((item.name, item.reason) for item in found.broken)
    assert reasons[("0/cat/link.png", "a link to nothing")] == 1
    assert sum(name.endswith("broken.png") for name, _ in reasons.elements()) == 2
    # All that the folder holds out is among the shards.
    readable = [splits.held_out.name(row) for row in range(len(splits.held_out))]
    assert {leak.name for leak in found.leaks} == {
        name for name in readable if not name.endswith("broken.png")
    }


def write_parquet(path: Path, *seeds: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    contents = [saved(path.with_suffix(".tmp"), seed) for seed in seeds]
    path.with_suffix(".tmp").unlink()
    images = [{"bytes": content, "path": None} for content in contents]
    parquet.write_table(arrow.table({"image": images}), path)


@pytest.mark.parametrize("name", ["some.parquet", "so[m]e.parquet"])
def test_parquet_files_are_scanned_by_name(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / name, 0, 1, 0)
    code, text, _ = invoke(str(tmp_path / name))
    assert code == 0
    assert "1 training images with the bytes of an earlier one" in text


def test_parquet_files_are_scanned_by_folder_and_by_pattern(tmp_path: Path) -> None:
    for name, seeds in (("train-0", (0, 1)), ("train-1", (2,)), ("test-0", (3, 1))):
        write_parquet(tmp_path / f"set/deep/{name}.parquet", *seeds)
    code, text, told = invoke(str(tmp_path / "set/deep"))
    assert code == 3
    assert "images      5: 3 for training, 2 held out" in text
    assert told == "bigsimclr: error: 1 held-out image among the training images\n"
    code, text, _ = invoke(f"{tmp_path}/set/**/*.parquet")
    assert (code, "images      5: 5 for training" in text) == (0, True)
    code, _, told = invoke(str(tmp_path / "set"))
    assert code == 3
    assert f"3 x .parquet; data scan takes '{tmp_path}/set/**/*.parquet'" in told
    code, _, told = invoke(f"{tmp_path}/nowhere/**/*.parquet")
    assert code == 3
    assert f"{tmp_path}/nowhere does not exist" in told


def test_held_out_files_beyond_those_compared_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("train-0", "validation-0", "test-0")):
        write_parquet(tmp_path / f"{name}.parquet", seed)
    assert "1 for training, 1 held out" in invoke(str(tmp_path))[1]
    assert (
        f"{tmp_path}: not read, beside train*.parquet and val*.parquet: test-0.parquet"
        in caplog.messages
    )


def test_files_of_other_suffixes_are_counted(photos: Path) -> None:
    for name in ("train/cat/a.heic", "train/b.HEIC", "val/c.heic", "train/notes", "val/d.txt"):
        (photos / name).write_bytes(b"")
    saved(photos / "train/cat/web.jfif", 40, "JPEG")
    (photos / "train/cat/grey.pgm").write_bytes(b"P5 3 2 255 " + bytes(range(6)))
    code, text, _ = invoke(str(photos))
    assert code == 3
    assert "skipped     5 files by their suffix: .heic 3, no suffix 1, .txt 1" in text.splitlines()
    assert "images      16: 10 for training, 6 held out" in text
    assert "formats     11 PNG, 3 JPEG, 1 PPM" in text.splitlines()
    assert "wrong suffix" not in text
    splits = found_folder(photos / "train")
    halves = Splits(splits.train.take(np.arange(4)), splits.train.take(np.arange(4, 10)))
    assert scan(halves, max_pixels=LIMIT).skipped == {".heic": 2, "no suffix": 1}


def test_mixtures_count_what_their_folders_skip(photos: Path, tmp_path: Path) -> None:
    for name in ("train/a.heic", "val/b.heic", "val/c.txt"):
        (photos / name).write_bytes(b"")
    (photos / "val/dog/broken.png").unlink()
    folders = [{"kind": "folder", "root": photos / part} for part in ("train", "val")]
    sources = tuple({"data": part | {"held_out_fraction": 0.3}} for part in folders)
    splits = build_data(MixData.model_validate({"kind": "mix", "sources": sources}))
    assert splits.held_out is not None
    assert scan(splits, max_pixels=LIMIT).skipped == {".heic": 2, ".txt": 1}


def test_empty_classes_and_classes_of_one_part_are_named(photos: Path) -> None:
    (photos / "train/empty").mkdir()
    saved(photos / "val/bird/x.png", 30)
    _, text, _ = invoke(str(photos))
    assert "            2 classes without training images: bird, empty" in text.splitlines()
    assert "            1 class without held-out images: empty" in text.splitlines()


def test_npz_files_are_scanned(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 20), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels)
    code, text, _ = invoke(str(tmp_path / "x.npz"))
    assert code == 0
    assert "classes     none: the images have no labels" in text


def test_torch_is_not_needed(photos: Path) -> None:
    code = (
        "import sys\n"
        "from bigsimclr.cli import app\n"
        f"sys.argv[1:] = ['data', 'scan', {str(photos / 'train')!r}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'sklearn', 'matplotlib', 'pyarrow'} & sys.modules.keys()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_every_held_out_folder_is_read_and_others_are_named(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(photos / "test/cat/leaked.png", 1)
    saved(photos / "test/dog/own.png", 30)
    saved(photos / "more/cat/unread.png", 1)
    found = scan(found_folder(photos), max_pixels=LIMIT)
    assert [(copy.name, copy.of) for copy in found.leaks] == [
        ("val/cat/same.png", "cat/2.png"),
        ("test/cat/leaked.png", "cat/1.png"),
    ]
    assert found.held_out is not None
    assert found.held_out.classes == {"cat": 3, "dog": 5}
    assert found.broken == (Broken("held out", "val/dog/broken.png", "empty file"),)
    assert [record.getMessage() for record in caplog.records] == [
        f"{photos}: not read, beside train: more"
    ]


def test_held_out_images_without_class_folders_are_compared(photos: Path) -> None:
    saved(photos / "test/leaked.png", 1)
    (photos / "val").rename(photos / "Validation")
    found = scan(found_folder(photos), max_pixels=LIMIT)
    assert found.train.classes == {"cat": 3, "dog": 5}
    assert found.held_out is not None
    assert found.held_out.classes == {"cat": 2, "dog": 4}
    assert found.leaks == (
        Copy("Validation/cat/same.png", "cat/2.png", None, is_same_class=True),
        Copy("test/leaked.png", "cat/1.png", None, is_same_class=True),
    )


def test_an_empty_held_out_folder_and_loose_images_are_named(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "test").mkdir()
    saved(photos / "loose.png", 3)
    found = scan(found_folder(photos), max_pixels=LIMIT)
    assert [leak.name for leak in found.leaks] == ["cat/same.png"]
    assert caplog.messages == [f"{photos}: not read, beside train: test, loose.png"]
    (photos / "val").rename(photos / "elsewhere")
    with pytest.raises(DataError, match="test holds 0 images"):
        found_folder(photos)


def test_a_folder_closed_to_the_reader_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed/inner").mkdir(parents=True)
        (folder / "closed").chmod(0)
        owner = os.geteuid()
        if owner == 0:
            os.seteuid(65_534)
        try:
            with pytest.raises(DataError, match="closed: Permission denied"):
                found_folder(folder / "closed")
            for shown in ("closed", "closed/inner"):
                code, _, told = invoke(str(folder / shown))
                assert code == 3
                assert told == f"bigsimclr: error: {folder / shown}: Permission denied\n"
        finally:
            os.seteuid(owner)
        (folder / "closed").chmod(0o755)


def test_a_list_that_cannot_be_written_is_told_before_the_work(photos: Path) -> None:
    (photos / "file").write_bytes(b"")
    code, text, told = invoke(str(photos), "--out", str(photos / "file/findings.jsonl"))
    assert (code, text) == (7, "")
    assert "file is a file, not a folder" in told


def test_small_and_plain_images_are_counted_as_not_compared() -> None:
    small = np.stack([photograph(seed, side=40)[:31, :40] for seed in (1, 2)])
    plain = np.stack([photograph(3, side=40)[:32, :32], np.full((32, 32, 3), 7, np.uint8)])
    found = [scan(Splits(ArraySource(part), None), max_pixels=LIMIT) for part in (small, plain)]
    assert [one.not_compared for one in found] == [2, 1]
    assert "2 too small or too plain to compare by look" in scan_text(found[0], shown=1, bits=4)


def test_handwritten_digits_are_no_copies_of_each_other() -> None:
    digits = build_data(DigitsData(kind="digits"))
    found = scan(digits, max_pixels=LIMIT)
    assert found.is_clean
    assert not found.alike
    assert found.not_compared == found.train.images + found.held_out.images


@pytest.mark.parametrize("how", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_handwritten_digits_that_hash_alike_are_told_apart(how: Image.Resampling) -> None:
    digits = build_data(DigitsData(kind="digits"))
    assert digits.held_out is not None

    def enlarged(source: Source) -> ArraySource:
        images = [np.asarray(source.read(index).image) for index in range(len(source))]
        large = [np.asarray(Image.fromarray(image).resize((32, 32), how)) for image in images]
        return ArraySource(np.stack(large), source.labels, classes=source.classes)

    splits = Splits(enlarged(digits.train), enlarged(digits.held_out))
    found = scan(splits, max_pixels=LIMIT)
    assert found.not_compared == 0
    assert (found.alike, found.leaks_alike) == ((), ())
    looks = [look_of(np.asarray(splits.train.read(index).image)) for index in range(1437)]
    hashes = np.unique(np.array([look.hash for look in looks if look is not None], np.uint64))
    pairs = {
        pair for one, other, _ in close_pairs(hashes, 4) for pair in zip(one, other, strict=True)
    }
    assert len(pairs) > 40


@pytest.mark.parametrize("name", ["train-00000.parquet#0000000", "000001", "a.v2"])
def test_only_suffixes_of_images_can_be_wrong(name: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(photograph(1, side=40)).save(stream, "PNG")
    for shown, expected in ((name, {}), ("a.jpg", {"wrong suffix": 1}), ("a.png", {})):
        source = OneImage(stream.getvalue(), shown)
        assert scan(Splits(source, None), max_pixels=LIMIT).traits == expected


class OneImage:
    """A source of one encoded image under a name."""

    classes: tuple[str, ...] = ()
    fingerprint = "one"
    image_size = None
    labels = np.full(1, -1, np.int64)

    def __init__(self, content: bytes, name: str) -> None:
        self._content, self._name = content, name

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return (self._name,)[index]

    def read(self, index: int) -> Sample:
        return Sample(image=self._content, label=-1, index=index)
