import contextlib
import ctypes
import json
import mmap
import os
import pickle
import resource
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bigsimclr.data import build_data, count_examples
from bigsimclr.data.decode import decode
from bigsimclr.data.shard_index import dali_index, index_path, index_shard, read_index
from bigsimclr.data.shards import ShardSource, open_shards
from bigsimclr.errors import DataError, StorageError
from bigsimclr.recipe.sources import ShardsData
from tests.data.conftest import Encode
from tests.data.tars import add, as_json, write_samples, write_tar


@pytest.fixture
def root(tmp_path: Path, png: Encode, pictures: NDArray[np.uint8]) -> Path:
    """Twelve pictures in three shards, labels 0 to 2, keys in order."""
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        write_samples(
            tmp_path / f"set/part-{shard}.tar",
            {f"{number:02d}.png": png(pictures[number]) for number in numbers},
            {f"{number:02d}": number % 3 for number in numbers},
        )
    return tmp_path / "set"


def test_images_are_read_at_random(root: Path, pictures: NDArray[np.uint8]) -> None:
    source = open_shards(root, "*.tar")
    assert source.classes == ("0", "1", "2")
    assert source.labels.tolist() == [number % 3 for number in range(12)]
    for index in (11, 0, 6, 7, 3, 11):
        sample = source.read(index)
        assert source.name(index) == f"{index:02d}.png"
        assert np.array_equal(decode(sample.image, max_pixels=99), pictures[index])
        assert (sample.label, sample.index) == (index % 3, index)
    again = pickle.loads(pickle.dumps(source))
    assert again.read(9).image == source.read(9).image
    assert again.fingerprint == source.fingerprint
    part = source.take(np.array([7, 2]))
    assert [part.name(0), part.name(1)] == ["07.png", "02.png"]
    assert part.read(1).image == source.read(2).image
    assert part.labels.tolist() == [1, 2]


def test_forked_processes_share_descriptors_and_read_the_same(root: Path) -> None:
    source = open_shards(root, "*.tar")
    expected = [source.read(index).image for index in range(12)]
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            same = all(
                source.read(index).image == expected[index]
                for _ in range(50)
                for index in range(12)
            )
            os._exit(0 if same else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_stay_few(tmp_path: Path) -> None:
    for number in range(200):
        write_samples(tmp_path / f"{number:03d}.tar", {f"{number:03d}.jpg": b"x"})
    source = open_shards(tmp_path, "*.tar")
    before = open_descriptors()
    for index in range(200):
        assert source.read(index).image == b"x"
    assert open_descriptors() - before <= 128
    del source
    assert open_descriptors() <= before


def test_a_process_that_may_open_few_files_reads_them_all(tmp_path: Path) -> None:
    for number in range(100):
        write_samples(tmp_path / f"{number:03d}.tar", {f"{number:03d}.jpg": b"x"})
    sources = [open_shards(tmp_path, "*.tar") for _ in range(3)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 30, hard))
        for source in sources[:1] * 2:
            assert [source.read(index).image for index in range(100)] == [b"x"] * 100
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(StorageError, match=r"00\.tar: too many open files; allow more with"):
            sources[1].read(0)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sources[1].read(0).image == b"x"


def test_how_images_are_cut_into_shards_does_not_matter(tmp_path: Path, root: Path) -> None:
    one = open_shards(root, "*.tar")
    samples = {one.name(index): one.read(index).image for index in (5, 3, 11, 0, 1)}
    samples |= {one.name(index): one.read(index).image for index in range(12)}
    labels = {f"{index:02d}": index % 3 for index in range(12)}
    write_samples(tmp_path / "other/all.tar", samples, labels)  # type: ignore[arg-type]
    other = open_shards(tmp_path / "other", "all.tar")
    assert other.fingerprint == one.fingerprint
    assert all(other.read(index).image == one.read(index).image for index in range(12))


def test_the_fingerprint_notices_changes(tmp_path: Path) -> None:
    found = set()
    for samples, labels in (
        ({"a.jpg": b"1", "b.jpg": b"2"}, {"a": 0, "b": 1}),
        ({"a.jpg": b"1", "b.jpg": b"2"}, {"a": 1, "b": 1}),
        ({"a.jpg": b"1", "c.jpg": b"2"}, {"a": 0, "c": 1}),
        ({"a.jpg": b"1", "b.jpg": b"22"}, {"a": 0, "b": 1}),
        ({"a.jpg": b"1"}, {"a": 0}),
    ):
        write_samples(tmp_path / "a.tar", samples, labels)
        found.add(open_shards(tmp_path, "*.tar").fingerprint)
    assert len(found) == 5


def test_labels_that_change_in_place_are_noticed(root: Path) -> None:
    before = open_shards(root, "*.tar")
    path = sorted(root.glob("*.tar"))[0]
    content = path.read_bytes()
    at = content.index(b".cls\0")
    place = (at // 512 + 1) * 512
    assert content[place : place + 1].isdigit()
    assert content[place : place + 1] != b"1"
    path.write_bytes(content[:place] + b"1" + content[place + 1 :])
    after = open_shards(root, "*.tar")
    assert (before.labels != after.labels).sum() == 1
    assert before.fingerprint != after.fingerprint


def resident(path: Path) -> float:
    """Return the share of a file that is in memory."""
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        size = len(mapped)
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * size).from_buffer(mapped)
        assert library.mincore(ctypes.byref(view), ctypes.c_size_t(size), found) == 0
        del view
    return sum(page & 1 for page in found) / pages


def test_the_second_read_of_a_window_asks_for_the_whole_shard(tmp_path: Path) -> None:
    samples = {f"{number:03d}.jpg": os.urandom(1 << 18) for number in range(64)}
    path = write_samples(tmp_path / "a.tar", samples)
    source = open_shards(tmp_path, "*.tar", window=2)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0.1:
        pytest.skip("this file system keeps files in memory")
    source.read(0)
    assert resident(path) < 0.9
    source.read(1)
    end = time.monotonic() + 20
    while resident(path) < 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert resident(path) == 1


def test_json_members_give_names_labels_and_classes(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "1.jpg": b"1",
            "1.json": as_json(label=1, name="dog/x.JPEG", **{"class": "dog"}),
            "1.cls": b"1\n",
            "2.json": as_json(label=0, name="cat/y.JPEG", **{"class": "cat"}, width=3),
            "2.jpg": b"2",
            "3.JPG": b"3",
            "3.json": as_json(name="unlabelled/z.JPEG"),
        },
    )
    source = open_shards(tmp_path, "*.tar")
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, -1]
    assert [source.name(n) for n in range(3)] == ["dog/x.JPEG", "cat/y.JPEG", "unlabelled/z.JPEG"]
    assert source.read(2).image == b"3"


def test_names_are_made_unique(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        write_tar(
            tmp_path / f"{shard}.tar", {"1.jpg": shard.encode(), "1.json": as_json(name="same")}
        )
    source = open_shards(tmp_path, "*.tar")
    assert [source.name(0), source.name(1)] == ["a.tar/1.jpg", "b.tar/1.jpg"]
    assert [source.read(0).image, source.read(1).image] == [b"a", b"b"]
    # A name that cannot be written is none.
    write_tar(tmp_path / "a.tar", {"1.jpg": b"1", "1.json": b'{"name": "\\ud800"}'})
    assert open_shards(tmp_path, "a.tar").name(0) == "1.jpg"


def test_shards_may_be_held_out(root: Path) -> None:
    section = ShardsData(kind="shards", root=root, train="part-[01].tar", held_out="part-2.tar")
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (len(splits.train), len(splits.held_out)) == (8, 4)
    assert splits.held_out_keys == "data.held_out"
    assert splits.held_out.classes == splits.train.classes
    with pytest.raises(DataError, match=r"part-1\.tar matches data\.train"):
        build_data(section.model_copy(update={"held_out": "part-[12].tar"}))
    with pytest.raises(DataError, match=r"^data\.held_out: \S+ has no files none\*;"):
        build_data(section.model_copy(update={"held_out": "none*"}))
    write_samples(root / "val.tar", {"x.png": b"1"}, {"x": 3})
    with pytest.raises(DataError, match="images of 1 class without training images: 3"):
        build_data(section.model_copy(update={"held_out": "val.tar"}))


def test_held_out_classes_are_matched_by_name(tmp_path: Path) -> None:
    for file, names in (("train", ["cat", "dog", "owl"]), ("val", ["dog", "owl"])):
        members: dict[str, bytes] = {}
        for label, name in enumerate(names):
            members |= {
                f"{name}.jpg": b"1",
                f"{name}.json": as_json(label=label, **{"class": name}),
            }
        write_tar(tmp_path / f"{file}.tar", members)
    section = ShardsData(kind="shards", root=tmp_path, train="train.tar", held_out="val.tar")
    held_out = build_data(section).held_out
    assert held_out is not None
    assert held_out.classes == ("cat", "dog", "owl")
    assert held_out.labels.tolist() == [1, 2]


def test_a_share_may_be_held_out(root: Path) -> None:
    section = ShardsData(kind="shards", root=root, held_out_fraction=0.25)
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (len(splits.train), len(splits.held_out)) == (9, 3)
    names = {part.name(n) for part in (splits.train, splits.held_out) for n in range(len(part))}
    assert names == {f"{number:02d}.png" for number in range(12)}


def test_the_index_is_written_once_and_noticed_when_stale(root: Path) -> None:
    shard = root / "part-0.tar"
    found, is_kept = index_shard(shard)
    assert is_kept
    stored = read_index(index_path(shard))
    assert stored is not None
    assert stored.to_json() == found.to_json()
    before = index_path(shard).stat()
    index_shard(shard)
    assert index_path(shard).stat().st_mtime_ns == before.st_mtime_ns
    # Another shard under the same name, of the same size.
    content = {f"{number:02d}.png": b"y" * 300 for number in range(4)}
    labels = {f"{number:02d}": 2 for number in range(4)}
    write_samples(shard, content, labels)
    shard.write_bytes(shard.read_bytes().ljust(found.bytes, b"\0")[: found.bytes])
    assert index_shard(shard)[0].labels.tolist() == [2] * 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda _: "[1]",
        lambda text: text[:-40],
        lambda text: text.replace("index 1", "index 0"),
        lambda text: text.replace('"offsets": [512,', '"offsets": [1e30,'),
        lambda text: text.replace('"offsets": [512,', '"offsets": [-512,'),
        lambda text: text.replace('"labels": [0,', '"labels": ['),
        lambda text: text.replace('"labels": [0,', '"labels": [99999999999999999999999,'),
        lambda text: text.replace('"classes": []', '"classes": {"a": {}}'),
        lambda text: text.replace('"names": [""', '"names": [3'),
        lambda text: text.replace('"names": [""', '"names": ["\\ud800"'),
        lambda text: text.replace('"left_out": {}', '"left_out": []'),
        lambda _: "[" * 100_000,
    ],
)
def test_a_spoilt_index_is_made_again(root: Path, spoil: Callable[[str], str]) -> None:
    shard = root / "part-0.tar"
    good = index_shard(shard)[0].to_json()
    spoilt = spoil(good)
    assert spoilt != good
    index_path(shard).write_text(spoilt, encoding="utf-8")
    assert index_shard(shard)[0].to_json() == good
    assert index_path(shard).read_text(encoding="utf-8") == good


def test_a_shard_that_changes_under_a_run_is_noticed(root: Path) -> None:
    source = open_shards(root, "*.tar")
    content = bytearray((root / "part-1.tar").read_bytes())
    content[:512] = bytes(512)
    (root / "part-1.tar").write_bytes(content)
    with pytest.raises(DataError, match="its shard was changed after it was indexed"):
        source.read(4)
    assert source.read(3).image
    (root / "part-2.tar").unlink()
    with pytest.raises(FileNotFoundError):
        source.read(8)


def test_a_folder_closed_to_writing_keeps_no_index(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.chmod(0o555)
    try:
        with caplog.at_level("INFO"):
            assert len(open_shards(root, "*.tar")) == 12
    finally:
        root.chmod(0o755)
    assert not list(root.glob("*.index"))
    assert "cannot be written: 3 indexes are kept in memory" in caplog.text


def test_other_members_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "folder", b"", type=tarfile.DIRTYPE)
        add(archive, "folder/1.jpg", b"1")
        add(archive, "folder/1.seg.png", b"mask")
        add(archive, "folder/1.pkl", b"cos\nsystem\n")
        add(archive, "folder/._1.jpg", b"resource fork")
        add(archive, "2.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "3.jpg", b"", type=tarfile.LNKTYPE, linkname="folder/1.jpg")
        add(archive, "4.jpg", b"", type=tarfile.CHRTYPE)
        add(archive, "5.cls", b"7")
        add(archive, "README", b"text")
    source = open_shards(tmp_path, "*.tar")
    assert [source.name(index) for index in range(len(source))] == ["folder/1.jpg"]
    assert source.classes == ()
    for what in (
        "2 x link",
        "1 x .seg.png",
        "1 x .pkl",
        "1 x hidden file",
        "1 x special",
    ):
        assert what in caplog.text
    assert index_shard(tmp_path / "a.tar")[0].left_out["label without an image"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"1", "1.png": b"2"}, r"member '1\.png' is a second image of its key"),
        ({"1.jpg": b"1", "1.cls": b"cat"}, r"member '1\.cls' holds 'cat', not a class number"),
        ({"1.jpg": b"1", "1.cls": b"9" * 30}, r"not a class number"),
        ({"1.jpg": b"1", "1.cls": b"99999999"}, r"99999999 is no class number"),
        ({"1.jpg": b"1", "1.json": b"{"}, r"member '1\.json' is not JSON"),
        ({"1.jpg": b"1", "1.json": b"[" * 100_000}, r"member '1\.json' is not JSON"),
        ({"1.jpg": b"1", "1.json": as_json(label="cat")}, r"'cat' is no class number"),
        ({"1.jpg": b"1", "1.json": as_json(label=True)}, r"True is no class number"),
        ({"1.jpg": b"1", "1.cls": b"1", "1.json": as_json(label=2)}, r"gives another label"),
        ({"1.txt": b"1"}, r"holds 0 images; left out of the shards: 1 x \.txt"),
        ({}, r"holds 0 images$"),
    ],
)
def test_shards_that_do_not_add_up_are_refused(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        open_shards(tmp_path, "*.tar")


def test_bad_shards_are_named_and_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "outer" / "inner"
    root.mkdir(parents=True)
    with tarfile.open(root / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "x.jpg", b"bad", pax_headers={"path": "../../canary.jpg"})
    with pytest.raises(DataError, match=r"a\.tar: member '\.\./\.\./canary\.jpg' escapes"):
        open_shards(root, "*.tar")
    with tarfile.open(root / "a.tar", "w") as archive:
        add(archive, "x.jpg", b"1")
        add(archive, "x.jpg", b"2")
    with pytest.raises(DataError, match=r"a\.tar: member 'x\.jpg' is there twice"):
        open_shards(root, "*.tar")
    whole = write_samples(root / "a.tar", {"x.jpg": b"x" * 5000}).read_bytes()
    (root / "a.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match=r"a\.tar is truncated .*'x\.jpg' lacks 2,512 bytes"):
        open_shards(root, "*.tar")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "outer", root, root / "a.tar"]


def test_labels_of_two_shards_must_agree(tmp_path: Path) -> None:
    for shard, name in (("a", "cat"), ("b", "dog")):
        facts = as_json(label=0, **{"class": name})
        write_tar(tmp_path / f"{shard}.tar", {f"{shard}.jpg": b"1", f"{shard}.json": facts})
    with pytest.raises(DataError, match="class 0 is called 'cat' and 'dog' in two shards"):
        open_shards(tmp_path, "*.tar")


def test_an_index_of_crafted_places_reads_no_other_bytes(root: Path) -> None:
    shard = root / "part-0.tar"
    found = json.loads(index_shard(shard)[0].to_json())
    found["offsets"][0] += 512
    index_path(shard).write_text(json.dumps(found), encoding="utf-8")
    source: ShardSource = open_shards(root, "*.tar")
    with pytest.raises(DataError, match="changed after it was indexed"):
        source.read(0)
    shutil.rmtree(root)


def test_the_index_for_dali_names_every_member(root: Path, tmp_path: Path) -> None:
    shard = root / "part-1.tar"
    with tarfile.open(shard) as archive:
        entries = [(entry.name, entry.offset_data, entry.size) for entry in archive]
    lines = ["v1.2 4"]
    for image, label in zip(entries[::2], entries[1::2], strict=True):
        parts = [f"{name[3:]} {at} {size} {name}" for name, at, size in (image, label)]
        lines.append(" ".join(parts))
    assert dali_index(shard).splitlines() == lines
    write_samples(tmp_path / "a.tar", {"with space.jpg": b"1"})
    with pytest.raises(DataError, match=r"a\.tar: 'with space\.jpg' has a space"):
        dali_index(tmp_path / "a.tar")
