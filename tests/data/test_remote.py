"""Shards at URLs that fsspec serves from this machine: a folder, and its memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.data import Source, build_data, count_examples
from bigsimclr.data.folder import training_folder
from bigsimclr.data.pack import pack
from bigsimclr.data.pack_file import NAME
from bigsimclr.data.shards import open_shards
from bigsimclr.errors import DataError, StorageError
from bigsimclr.recipe.sources import ShardsData
from tests.data.test_loader import loader

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def packed(class_folder: Path, tmp_path: Path) -> Path:
    pack(training_folder(class_folder, ".", labelled=True), tmp_path / "there", shard_bytes=3000)
    return tmp_path / "there"


def images(source: Source) -> list[object]:
    return [source.read(index).image for index in range(len(source))]


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def test_shards_are_copied_when_they_are_first_needed(packed: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    source = open_shards(copies, "*.tar", remote=packed.as_uri())
    local = open_shards(packed, "*.tar")
    assert source.fingerprint == local.fingerprint
    assert shards_in(copies) == []
    assert source.read(5).image == local.read(5).image
    assert len(shards_in(copies)) == 1
    assert images(source) == images(local)
    assert shards_in(copies) == shards_in(packed)
    for name in shards_in(packed):
        assert (copies / name).read_bytes() == (packed / name).read_bytes()
    # What is there is not asked for again.
    stamps = {name: (copies / name).stat().st_mtime_ns for name in shards_in(copies)}
    again = open_shards(copies, "*.tar", remote=packed.as_uri())
    assert images(again) == images(local)
    assert {name: (copies / name).stat().st_mtime_ns for name in stamps} == stamps


def test_memory_urls_and_folders_without_indexes(packed: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in packed.glob("*.tar"):
        files.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    section = ShardsData(
        kind="shards",
        root=tmp_path / "copies",
        remote="memory://bucket/set",
        order="runs",
        window=2,
    )
    try:
        splits = build_data(section)
        assert count_examples(section) == (12, 0)
        assert images(splits.train) == images(open_shards(packed, "*.tar"))
    finally:
        files.rm("/bucket", recursive=True)
    with pytest.raises(DataError, match=r"^data\.train: memory://bucket/set has no files \*\.tar"):
        build_data(section)


def test_many_processes_copy_a_shard_once(packed: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    source = open_shards(copies, "*.tar", remote=packed.as_uri())
    expected = images(open_shards(packed, "*.tar"))
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            os._exit(0 if images(source) == expected else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert shards_in(copies) == shards_in(packed)
    assert not list(copies.glob("*.tmp"))


def test_a_shard_that_changed_is_refused(packed: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    source = open_shards(copies, "*.tar", remote=packed.as_uri())
    first = shards_in(packed)[0]
    content = bytearray((packed / first).read_bytes())
    content[600] ^= 1
    (packed / first).write_bytes(content)
    with pytest.raises(DataError, match=rf"{first} is not the shard that was indexed"):
        images(source)
    (packed / first).write_bytes(content[:-512])
    with pytest.raises(DataError, match=rf"{first} is not the shard that was indexed"):
        images(source)
    with pytest.raises(DataError, match=rf"^data\.remote: \S+: {first} has [\d,]+ bytes$"):
        open_shards(copies, "*.tar", remote=packed.as_uri())
    assert first not in shards_in(copies)
    (packed / NAME).unlink()
    (copies / first).write_bytes(b"something else")
    with pytest.raises(DataError, match=rf"{first} is not a copy of \S+{first}, which has"):
        open_shards(copies, "*.tar", remote=packed.as_uri())
    assert (copies / first).read_bytes() == b"something else"


def test_an_index_of_another_shard_is_not_used(packed: Path, tmp_path: Path) -> None:
    (packed / NAME).unlink()
    names = shards_in(packed)
    shutil.copy(packed / f"{names[0]}.index", packed / f"{names[1]}.index")
    (packed / f"{names[2]}.index").write_text("{}")
    assert (packed / names[0]).stat().st_size == (packed / names[1]).stat().st_size
    source = open_shards(tmp_path / "copies", "*.tar", remote=packed.as_uri())
    assert shards_in(tmp_path / "copies") == [names[2]]
    with pytest.raises(DataError, match=rf"{names[1]} is not the shard that was indexed"):
        images(source)


def test_what_cannot_be_asked_is_told(packed: Path, tmp_path: Path) -> None:
    for url, message in (
        ("nonsense://x", r"ValueError: Protocol not known: nonsense"),
        (f"{packed.as_uri()}/none", r"none has no files \*\.tar"),
    ):
        with pytest.raises(DataError, match=message):
            open_shards(tmp_path / "copies", "*.tar", remote=url)
    facts = (packed / NAME).read_text()
    (packed / NAME).write_text(facts[: facts.index('"files"')] + '"files": []}')
    with pytest.raises(DataError, match="packing was not finished"):
        open_shards(tmp_path / "copies", "*.tar", remote=packed.as_uri())


def test_training_images_are_not_held_out(packed: Path, tmp_path: Path) -> None:
    section = ShardsData(
        kind="shards",
        root=tmp_path / "copies",
        remote=packed.as_uri(),
        train="shard-00000[0-7].tar",
        held_out="shard-00000[7-9].tar",
    )
    with pytest.raises(DataError, match=r"shard-000007\.tar matches data\.train"):
        build_data(section)
    splits = build_data(section.model_copy(update={"held_out": "shard-00000[89].tar"}))
    assert splits.held_out is not None
    assert (len(splits.train), len(splits.held_out)) == (8, 2)
    assert np.isin(splits.train.labels, range(3)).all()


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from pathlib import Path\n"
        "from bigsimclr.data.shards import open_shards\n"
        "from bigsimclr.errors import MissingExtraError\n"
        "try: open_shards(Path('x'), '*.tar', remote='memory://x')\n"
        "except MissingExtraError as error: assert \"'bigsimclr[remote]'\" in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pack_that_is_not_all_there_is_refused(packed: Path, tmp_path: Path) -> None:
    lost = sorted(packed.glob("*.tar"))[1]
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost.name} of the pack is not there"):
        open_shards(tmp_path / "copies", "*.tar", remote=packed.as_uri())
    # What the pattern leaves out must be there, too.
    with pytest.raises(DataError, match=f"{lost.name} of the pack is not there"):
        open_shards(tmp_path / "copies", "*-000000.tar", remote=packed.as_uri())
    lost.write_bytes(kept)
    assert len(open_shards(tmp_path / "copies", "*-000000.tar", remote=packed.as_uri())) < 12


@pytest.mark.parametrize("workers", [0, 2])
def test_an_outage_ends_a_run_and_replaces_no_image(
    packed: Path, tmp_path: Path, workers: int
) -> None:
    source = open_shards(tmp_path / "copies", "*.tar", remote=packed.as_uri())
    packed.rename(tmp_path / "away")
    with pytest.raises(StorageError, match=r"data\.remote: .*FileNotFoundError"):
        source.read(0)
    stream = loader(source, workers=workers, unreadable_limit=1.0)
    with pytest.raises(DataError, match=r"data\.remote: .*FileNotFoundError"):
        next(iter(stream.batches(0, 1)))
    assert not stream.unreadable
