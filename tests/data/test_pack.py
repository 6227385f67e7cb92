import hashlib
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.augment import ViewSettings
from bigsimclr.data import Source, build_data
from bigsimclr.data.folder import FolderSource, training_folder
from bigsimclr.data.loader import Loader, view_hash
from bigsimclr.data.pack import Progress, pack
from bigsimclr.data.pack_file import NAME, read_pack
from bigsimclr.data.shards import ShardSource, open_shards
from bigsimclr.data.steps import Means
from bigsimclr.errors import DataError, StorageError
from bigsimclr.recipe.sources import ShardsData
from tests.data.conftest import Encode
from tests.data.test_real_images import CIFAR10, DATA, REPOSITORY

SETTINGS = ViewSettings(image_size=8, colour_strength=1.0, colour_probability=0.8)


def test_every_format_is_packed_under_a_name_that_is_read(tmp_path: Path) -> None:
    contents = {"a.pgm": b"P5 2 2 255 " + bytes(4), "b.jfif": b"\xff\xd8\xff", "c.jpg": b"P6 "}
    (tmp_path / "x").mkdir()
    for name, content in contents.items():
        (tmp_path / "x" / name).write_bytes(content)
    pack(folder_of(tmp_path / "x"), tmp_path / "pack", shuffled=False)
    (shard,) = (tmp_path / "pack").glob("*.tar")
    with tarfile.open(shard) as members:
        images = [name for name in members.getnames() if not name.endswith((".json", ".cls"))]
    assert sorted(images) == ["000000000.ppm", "000000001.jpg", "000000002.ppm"]


def folder_of(root: Path) -> FolderSource:
    return training_folder(root, ".", labelled=True)


def contents(source: Source) -> dict[str, tuple[bytes, int, str]]:
    found = {}
    for index in range(len(source)):
        sample = source.read(index)
        assert isinstance(sample.image, bytes)
        kind = source.classes[sample.label] if sample.label >= 0 else ""
        found[source.name(index)] = (sample.image, sample.label, kind)
    assert len(found) == len(source)
    return found


@pytest.mark.parametrize(("workers", "shuffled"), [(1, True), (1, False), (2, True)])
def test_a_packed_folder_is_the_folder(
    class_folder: Path, tmp_path: Path, workers: int, shuffled: bool
) -> None:
    source = folder_of(class_folder)
    told: list[Progress] = []
    packed = pack(
        source,
        tmp_path / "pack",
        shard_bytes=10_000,
        shuffled=shuffled,
        workers=workers,
        report=told.append,
    )
    assert packed.shards == len(packed.files) == len(list((tmp_path / "pack").glob("*.tar"))) > 3
    assert packed == read_pack(tmp_path / "pack")
    assert [(step.doing, step.shards) for step in told] == [
        (doing, number + 1) for doing in ("packed", "verified") for number in range(packed.shards)
    ]
    for file in packed.files:
        content = (tmp_path / "pack" / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    shards = build_data(ShardsData(kind="shards", root=tmp_path / "pack")).train
    assert shards.fingerprint == source.fingerprint
    assert shards.classes == source.classes
    assert contents(shards) == contents(source)
    assert [shards.name(n) for n in range(12)] == [source.name(n) for n in range(12)]


def _hashes(source: Source, workers: int, seed: int = 5) -> list[str]:
    loader = Loader(
        source,
        indices=np.arange(len(source)),
        labels=source.labels,
        settings=SETTINGS,
        views=2,
        seed=seed,
        global_batch=5,
        means=Means(workers=workers),
    )
    return [view_hash(batch) for batch in loader.batches(3, 6)]


def test_one_view_hash_from_a_folder_and_from_its_shards(
    class_folder: Path, tmp_path: Path
) -> None:
    source = folder_of(class_folder)
    expected = _hashes(source, 0)
    assert len(set(expected)) == 6
    for name, size, shuffled in (("a", 3000, True), ("b", 8000, False), ("c", 1 << 30, True)):
        pack(source, tmp_path / name, shard_bytes=size, shuffled=shuffled)
        shards = open_shards(tmp_path / name, "*.tar")
        for workers in range(4) if name == "a" else (0, 2):
            assert _hashes(shards, workers) == expected


def test_shards_mix_the_classes_unless_told_otherwise(tmp_path: Path) -> None:
    for label in range(4):
        for number in range(100):
            path = tmp_path / f"set/{label}/{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xff\xd8\xff" + bytes([label, number]))
    source = folder_of(tmp_path / "set")
    found = {}
    for shuffled in (True, False):
        place = tmp_path / str(shuffled)
        size = 100 * (5 + 6 * 512)
        assert pack(source, place, shard_bytes=size, shuffled=shuffled).shards == 4
        found[shuffled] = [
            np.bincount(open_shards_part(place, number).labels, minlength=4).tolist()
            for number in range(4)
        ]
    assert found[False] == [[100 * (a == b) for b in range(4)] for a in range(4)]
    assert np.min(found[True]) > 10


def open_shards_part(place: Path, number: int) -> ShardSource:
    return open_shards(place, f"shard-{number:06d}.tar")


def test_odd_names_and_formats_survive(tmp_path: Path, png: Encode) -> None:
    root = tmp_path / "set"
    (root / "a class.v1").mkdir(parents=True)
    image = png(np.zeros((2, 2, 3), np.uint8))
    names = ["a.v1.jpg", "a.png", "a.jpg", "b c\n.JPEG", "d.tiff", "\udcff.png"]
    for name in names:
        (root / "a class.v1" / name).write_bytes(image)
    (root / "a class.v1" / "broken.webp").write_bytes(b"<html>")
    (root / "a class.v1" / "empty.gif").write_bytes(b"")
    source = folder_of(root)
    pack(source, tmp_path / "pack")
    assert contents(open_shards(tmp_path / "pack", "*.tar")) == contents(source)
    assert len(source) == 8


def test_parquet_and_unlabelled_images_are_packed_as_well(
    tmp_path: Path,
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    from bigsimclr.data.parquet import open_parquet

    rows = [{"bytes": b"\x89PNG" + bytes([n]), "path": None} for n in range(9)] + [None]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", row_group_size=4)
    source = open_parquet(tmp_path, "a.parquet")
    pack(source, tmp_path / "pack", shard_bytes=9000)
    shards = open_shards(tmp_path / "pack", "*.tar")
    assert contents(shards) == contents(source)
    assert shards.classes == ()
    # Shards can be packed again, cut otherwise.
    pack(shards, tmp_path / "again", shard_bytes=1 << 20)
    assert contents(open_shards(tmp_path / "again", "*.tar")) == contents(source)


def test_packing_continues_and_says_what_is_damaged(class_folder: Path, tmp_path: Path) -> None:
    source, place = folder_of(class_folder), tmp_path / "pack"
    first = pack(source, place, shard_bytes=3000)
    stamps = {path.name: path.stat().st_mtime_ns for path in place.glob("*.tar")}
    missing = place / first.files[2].name
    missing.unlink()
    (place / f".{missing.name}.0123456789ab.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match=r"1 shard of the pack not there: shard-000002\.tar"):
        open_shards(place, "*.tar")
    assert pack(source, place, shard_bytes=3000) == first
    assert not list(place.glob(".*"))
    for path in place.glob("*.tar"):
        assert (path.stat().st_mtime_ns == stamps[path.name]) == (path != missing)
    # A byte of an image, which no header shows.
    content = bytearray(missing.read_bytes())
    content[700] ^= 1
    missing.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000002\.tar has damaged images: 0000000\d\d;"):
        pack(source, place, shard_bytes=3000)
    content[700] ^= 1
    # Labels and facts are no images, and are compared too.
    for text, other, message in (
        (b'"sha256"', b'"sha25x"', r"has damaged images: 0000000\d\d;"),
        (b'"class"', b'"clasz"', "is not the file that was verified before"),
        (b'{"name"', b'["name"', "is not JSON"),
    ):
        missing.write_bytes(bytes(content).replace(text, other, 1))
        with pytest.raises(DataError, match=message):
            pack(source, place, shard_bytes=3000)
    missing.unlink()
    (place / first.files[1].name).rename(missing)
    with pytest.raises(DataError, match=r"shard-000002\.tar holds other images than were packed"):
        pack(source, place, shard_bytes=3000)


def test_an_unfinished_pack_is_not_read(class_folder: Path, tmp_path: Path) -> None:
    source, place = folder_of(class_folder), tmp_path / "pack"
    done = pack(source, place, shard_bytes=3000)
    facts = json.loads(done.to_json())
    (place / NAME).write_text(json.dumps({**facts, "files": []}))
    with pytest.raises(DataError, match="packing was not finished; run `bigsimclr data pack`"):
        open_shards(place, "*.tar")
    for spoilt in ("", "[]", json.dumps({**facts, "files": facts["files"][:1]}), "[" * 99_999):
        (place / NAME).write_text(spoilt)
        with pytest.raises(DataError, match=r"pack\.json is damaged"):
            open_shards(place, "*.tar")
    (place / NAME).write_text(json.dumps({**facts, "format": "bigsimclr pack 9"}))
    with pytest.raises(DataError, match="another version"):
        open_shards(place, "*.tar")
    (place / NAME).unlink()
    assert len(open_shards(place, "*.tar")) == 12


def test_strangers_and_other_packs_are_left_alone(class_folder: Path, tmp_path: Path) -> None:
    source, place = folder_of(class_folder), tmp_path / "pack"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds other files: thesis\.txt; name a new folder"):
        pack(source, place)
    with pytest.raises(StorageError, match="is a file; name a folder"):
        pack(source, place / "thesis.txt")
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]
    (place / "thesis.txt").unlink()
    pack(source, place, shard_bytes=3000)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(StorageError, match=r"holds a pack cut otherwise \(12 images in \d+ shards"):
        pack(source, place, shard_bytes=9000)
    with pytest.raises(StorageError, match="holds a pack cut otherwise"):
        pack(source, place, shard_bytes=3000, shuffled=False)
    with pytest.raises(StorageError, match="holds a pack of other images"):
        pack(source.take(np.arange(11)), place, shard_bytes=3000)
    (place / "shard-000099.tar").write_bytes(b"")
    with pytest.raises(StorageError, match=r"holds other files: shard-000099\.tar"):
        pack(source, place, shard_bytes=3000)
    (place / "shard-000099.tar").unlink()
    assert {path.name: path.read_bytes() for path in place.glob("[!.]*")} == before


def test_an_image_that_cannot_be_read_is_named(class_folder: Path, tmp_path: Path) -> None:
    source = folder_of(class_folder)
    (class_folder / "class_1/04.png").unlink()
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"^class_1/04\.png cannot be read: No such file"):
            pack(source, tmp_path / "pack", workers=workers)
    assert [path.name for path in (tmp_path / "pack").glob("[!.]*")] == [NAME]


def test_dali_reads_the_shards(class_folder: Path, tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn", exc_type=ImportError)
    from nvidia.dali import pipeline_def

    pack(folder_of(class_folder), tmp_path / "pack", shard_bytes=3000)
    paths = sorted((tmp_path / "pack").glob("*.tar"))

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def pipeline() -> tuple[object, ...]:
        images, labels, facts = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["png", "cls", "json"],
            missing_component_behavior="error",
        )
        return images, labels, facts

    images, labels, facts = pipeline().run()
    shards = contents(open_shards(tmp_path / "pack", "*.tar"))
    for row in range(12):
        name = json.loads(bytes(facts.at(row)))["name"]
        assert shards[name][:2] == (bytes(images.at(row)), int(bytes(labels.at(row))))


def _run(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bigsimclr", "data", "pack", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _pack_under_fire(
    words: Sequence[str], place: Path, moments: Sequence[int], seconds: float
) -> list[int]:
    """Kill packing whenever so many shards are there, and a little later; then let it end.

    Returns the numbers of shards that kills left.
    """
    rng, left = random.Random(0), []
    for moment in moments:
        process = _run(words)
        while process.poll() is None and len(list(place.glob("*.tar"))) < moment:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        left.append(len(list(place.glob("*.tar"))))
        # Whatever is there under its name is whole.
        for path in place.glob("*.tar"):
            assert path.read_bytes()[-1024:] == bytes(1024)
    process = _run(words)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "verified" in out
    return left


def _same_images(source: Source, place: Path) -> None:
    shards = open_shards(place, "*.tar")
    assert len(shards) == len(source)
    for index in range(len(source)):
        assert shards.name(index) == source.name(index)
        assert shards.read(index) == source.read(index)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_pack_killed_ten_times_loses_and_doubles_nothing(tmp_path: Path, png: Encode) -> None:
    rng = np.random.default_rng(0)
    for number in range(2000):
        path = tmp_path / f"set/{number % 7}/{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)))
    place = tmp_path / "pack"
    words = [str(tmp_path / "set"), "-o", str(place), "--shard-mb", "1", "--workers", "2"]
    left = _pack_under_fire(words, place, range(0, 20, 2), 0.02)
    assert len(set(left)) >= 5
    _same_images(folder_of(tmp_path / "set"), place)


@pytest.mark.long
def test_cifar10_killed_ten_times_loses_and_doubles_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    if not CIFAR10.is_dir():
        pytest.skip(f"no CIFAR-10 in {DATA}")
    from bigsimclr.data.parquet import open_parquet

    place = tmp_path / "pack"
    words = [str(CIFAR10 / "*.parquet"), "-o", str(place), "--shard-mb", "4", "--workers", "2"]
    left = _pack_under_fire(words, place, [*range(0, 48, 6), 50, 50], 0.05)
    assert len(set(left)) >= 7
    source = open_parquet(CIFAR10, "*.parquet")
    assert len(source) == 60_000
    _same_images(source, place)


def test_only_one_process_packs(class_folder: Path, tmp_path: Path) -> None:
    source, place = folder_of(class_folder), tmp_path / "pack"
    refused: list[str] = []

    def again(_: Progress) -> None:
        with pytest.raises(StorageError, match="another process is packing into") as caught:
            pack(source, place)
        refused.append(str(caught.value))

    pack(source, place, report=again)
    assert len(refused) == 2
