import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from bigsimclr.data import build_data, count_examples
from bigsimclr.data.decode import decode
from bigsimclr.data.parquet import open_parquet
from bigsimclr.errors import DataError
from bigsimclr.recipe.sources import ParquetData
from tests.data.conftest import Encode

NAMES = ["cat", "dog", "owl"]


def write(path: Path, images: list[bytes | None], **columns: object) -> None:
    paths = columns.pop("paths", [None] * len(images))
    rows = [{"bytes": image, "path": at} for image, at in zip(images, paths, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = columns.pop("names", None)
    table = pa.table({"image": pa.array(rows, kind), **columns})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


@pytest.fixture
def root(tmp_path: Path, png: Encode, pictures: NDArray[np.uint8]) -> Path:
    images = [png(picture) for picture in pictures]
    for number, part in enumerate((images[:7], images[7:])):
        labels = [row % 3 for row in range(len(part))]
        write(tmp_path / f"set/train-{number}.parquet", part, label=labels, names=NAMES)
    write(tmp_path / "set/test.parquet", images[:2], label=[2, -1], names=NAMES)
    return tmp_path / "set"


@pytest.mark.parametrize("held_bytes", [1 << 30, 0])
def test_rows_are_read_in_order(root: Path, pictures: NDArray[np.uint8], held_bytes: int) -> None:
    source = open_parquet(root, "train*.parquet", held_bytes=held_bytes)
    assert source.classes == tuple(NAMES)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert source.name(8) == "train-1.parquet#0000001"
    for index in (11, 0, 6, 7, 3, 11):
        sample = source.read(index)
        assert np.array_equal(decode(sample.image, max_pixels=99), pictures[index])
        assert (sample.label, sample.index) == (source.labels[index], index)
    again = pickle.loads(pickle.dumps(source))
    assert again.read(9).image == source.read(9).image


def test_files_may_be_held_out(root: Path) -> None:
    section = ParquetData(kind="parquet", root=root, held_out="test.parquet")
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (len(splits.train), len(splits.held_out)) == (12, 2)
    assert splits.held_out.labels.tolist() == [2, -1]
    assert splits.held_out_keys == "data.held_out"
    with pytest.raises(DataError, match=r"^data\.held_out: \S+ has no files none\*;"):
        build_data(section.model_copy(update={"held_out": "none*"}))


def test_a_share_may_be_held_out(root: Path, pictures: NDArray[np.uint8]) -> None:
    section = ParquetData(kind="parquet", root=root, held_out_fraction=0.25)
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (len(splits.train), len(splits.held_out)) == (9, 3)
    whole = open_parquet(root, "train*.parquet")
    numbers = {whole.name(index): index for index in range(12)}
    for part in (splits.train, splits.held_out):
        for index in range(len(part)):
            number = numbers.pop(part.name(index))
            assert np.array_equal(decode(part.read(index).image, max_pixels=99), pictures[number])
            assert part.labels[index] == whole.labels[number]
    assert not numbers


def test_stored_paths_are_names_where_they_are_unique(tmp_path: Path) -> None:
    write(tmp_path / "s/a.parquet", [b"1", b"2"], paths=["n01/x.JPEG", "n02/y.JPEG"])
    source = open_parquet(tmp_path / "s", "a.parquet")
    assert [source.name(0), source.name(1)] == ["n01/x.JPEG", "n02/y.JPEG"]
    write(tmp_path / "s/a.parquet", [b"1", b"2"], paths=["x.JPEG", "x.JPEG"])
    assert open_parquet(tmp_path / "s", "a.parquet").name(1) == "a.parquet#0000001"


def test_labels_and_names_are_optional(tmp_path: Path) -> None:
    write(tmp_path / "s/a.parquet", [b"1", b"22", None])
    source = open_parquet(tmp_path / "s", "*")
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1, -1])
    assert [source.read(row).image for row in range(3)] == [b"1", b"22", b""]
    write(tmp_path / "s/a.parquet", [b"1", b"2", b"3"], label=pa.array([1, None, 0]))
    assert open_parquet(tmp_path / "s", "*").classes == ("0", "1")
    assert open_parquet(tmp_path / "s", "*").labels.tolist() == [1, -1, 0]


def test_the_fingerprint_notices_changes(tmp_path: Path) -> None:
    found = set()
    for images, labels in (([b"1", b"2"], [0, 1]), ([b"1", b"2"], [1, 1]), ([b"1", b"22"], [0, 1])):
        write(tmp_path / "s/a.parquet", images, label=labels)
        found.add(open_parquet(tmp_path / "s", "*").fingerprint)
    assert len(found) == 3


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    section = ParquetData(kind="parquet", root=folder)
    with pytest.raises(DataError, match=r"^data\.root: \S+/s does not exist; give the folder"):
        count_examples(section)
    folder.mkdir()
    with pytest.raises(DataError, match=r"^data\.train: \S+/s has no files .*; it holds nothing$"):
        count_examples(section)
    (folder / "val.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"no files train\*\.parquet; it holds val\.parquet$"):
        build_data(section)
    with pytest.raises(DataError, match=r"data\.train: '/x\*' is not a pattern"):
        build_data(section.model_copy(update={"train": "/x*"}))
    with pytest.raises(
        DataError,
        match=r"^data\.root: \S+val\.parquet is a file, not a folder;"
        r" give its folder as data\.root and its name as data\.train$",
    ):
        build_data(section.model_copy(update={"root": folder / "val.parquet"}))
    (folder / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a parquet file"):
        count_examples(section)
    pq.write_table(pa.table({"picture": [b"1"]}), folder / "train.parquet")
    with pytest.raises(DataError, match="no column `image`"):
        build_data(section)
    write(folder / "train.parquet", [b"1"], label=["cat"])
    with pytest.raises(DataError, match="whole numbers"):
        build_data(section)
    write(folder / "train.parquet", [b"1"], label=[5], names=NAMES)
    with pytest.raises(DataError, match="beyond the 3 classes"):
        build_data(section)


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path\n"
        "from bigsimclr.data import count_examples\n"
        "from bigsimclr.errors import MissingExtraError\n"
        "from bigsimclr.recipe.sources import ParquetData\n"
        "try: count_examples(ParquetData(kind='parquet', root=Path('x')))\n"
        "except MissingExtraError as error: assert \"'bigsimclr[parquet]'\" in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_is_trained_on_is_not_held_out(root: Path) -> None:
    section = ParquetData(kind="parquet", root=root, train="*.parquet", held_out="test*.parquet")
    with pytest.raises(DataError, match=r"test\.parquet matches data\.train"):
        build_data(section)
