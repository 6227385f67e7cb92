"""Checkpoints of TensorFlow: the stored numbers, or one clear error; never anything else."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_bundle import Variable, open_bundle
from tests.golden.checkpoints import unpack
from tests.golden.paths import golden_dir
from tests.interop import write_bundle as write

FLOAT32 = write.NUMBERS["float32"]
STRING = write.NUMBERS["string"]
NAMES = sorted(set(write.NUMBERS) - {"string", "bool", "bfloat16"})
DATA = np.arange(6, dtype="float32").tobytes()  # of one variable [2,3]
ENTRY = write.entry(FLOAT32, (2, 3), size=24, crc=write.masked_crc(DATA))


def _variables() -> dict[str, NDArray[np.generic] | bytes]:
    generator = np.random.default_rng(0)
    variables: dict[str, NDArray[np.generic] | bytes] = {
        f"model/layer_{number:02d}/kernel": generator.normal(size=(2, number)).astype("float32")
        for number in range(20)
    }
    variables |= {
        f"types/{name}": generator.integers(0, 100, (2, 1, 3)).astype(name) for name in NAMES
    }
    variables |= {
        "_CHECKPOINTABLE_OBJECT_GRAPH": bytes(range(256)) * 2,
        "empty_text": b"",
        "empty": np.zeros((3, 0, 5), "float32"),
        "global_step": np.array(2**40, "int64"),
        "ä/é": np.array([np.nan, np.inf, -0.0]),
    }
    return variables


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 18])
def test_what_was_written_comes_back(tmp_path: Path, shards: int, block_bytes: int) -> None:
    prefix, variables = tmp_path / "model.ckpt-7", _variables()
    write.write_bundle(prefix, variables, shards=shards, block_bytes=block_bytes)
    bundle = open_bundle(prefix)
    assert bundle.prefix == prefix
    assert list(bundle.variables) == sorted(variables)
    for name, value in variables.items():
        if isinstance(value, bytes):
            assert bundle.variables[name] == Variable("string", ())
            assert bundle.read_text(name) == value
            continue
        assert bundle.variables[name] == Variable(value.dtype.name, value.shape)
        array = bundle.read(name)
        assert array.dtype == value.dtype
        assert array.dtype.isnative
        assert array.flags.writeable
        np.testing.assert_array_equal(array, value)
    # Arrays are copies: neither other reads nor the files know of changes.
    bundle.read("global_step")[...] = 1
    assert bundle.read("global_step") == 2**40


def test_large_arrays_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigsimclr.interop.tf_bundle._CHUNK", 1000)
    value = np.random.default_rng(1).normal(size=(31, 41))
    write.write_bundle(tmp_path / "x", {"a": value, "b": b"text" * 1000})
    bundle = open_bundle(tmp_path / "x")
    np.testing.assert_array_equal(bundle.read("a"), value)
    assert bundle.read_text("b") == b"text" * 1000


def test_links_are_followed(tmp_path: Path) -> None:
    write.write_bundle(tmp_path / "x", {"a": np.ones(3)})
    for name in ("index", "data-00000-of-00001"):
        (tmp_path / f"y.{name}").symlink_to(f"x.{name}")
    assert open_bundle(tmp_path / "y").read("a").tolist() == [1, 1, 1]


def test_what_is_not_read(tmp_path: Path) -> None:
    """Variables of other types are listed, so that those beside them can be read."""
    write.write_entries(
        tmp_path / "x",
        [
            (b"a/brain", write.entry(write.NUMBERS["bfloat16"], (2,), size=4)),
            (b"b/new", write.entry(99, (2,), offset=4, size=1)),
            (b"c/flag", write.entry(write.NUMBERS["bool"], (), offset=5, size=1)),
            (b"d/texts", write.entry(STRING, (2,), offset=6, size=6)),
        ],
    )
    bundle = open_bundle(tmp_path / "x")
    assert bundle.variables["a/brain"] == Variable("bfloat16", (2,))
    for name, kind in zip(
        bundle.variables, ("bfloat16", "number 99", "bool", "string"), strict=True
    ):
        with pytest.raises(CheckpointError, match=f"{name!r} is of type {kind}, which cannot"):
            bundle.read(name)
        with pytest.raises(CheckpointError, match="where one string is expected"):
            bundle.read_text(name)
    with pytest.raises(CheckpointError, match="x has no variable 'other'"):
        bundle.read("other")


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    more = (
        write.integer(50, 3) + write.message(51, b"text") + write.varint(52 << 3 | 1) + b"8bytes.."
    )
    shape = write.message(2, write.message(2, b"name") + write.integer(1, 2) + more)
    shape += write.message(2, write.integer(1, 3)) + write.integer(3, 0)
    value = write.integer(1, FLOAT32) + more + write.message(2, shape) + write.integer(5, 24)
    value += write.varint(6 << 3 | 5) + struct.pack("<I", write.masked_crc(DATA))
    rows = [(b"", write.header() + more), (b"a", value)]
    write.write_files(tmp_path / "x", write.table(rows)[0], [DATA])
    assert open_bundle(tmp_path / "x").read("a").tolist() == [[0, 1, 2], [3, 4, 5]]


def _place(**fields: int) -> bytes:
    return write.entry(FLOAT32, (2, 3), **{"size": 24, **fields})


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (_place(offset=1), r"24 bytes, but 'a' ends at 25"),
        (_place(offset=2**63 - 1), "but 'a' ends at"),
        (_place(offset=-1), "lies in shard 0 at -1 with 24 bytes"),
        (_place(size=-24), "with -24 bytes"),
        (_place(size=20), r"'a' has 20 bytes, not those of float32 \[2, 3\]"),
        (_place(size=2**62), "bytes, not those of float32"),
        (_place(shard=1), "lies in shard 1"),
        (_place(shard=-1), "lies in shard -1"),
        (write.entry(FLOAT32, (2, -3), size=24), r"impossible shape \[2, -3\]"),
        (write.entry(FLOAT32, (-2, -3), size=24), "impossible shape"),
        (write.entry(FLOAT32, (2**62, 4), size=0), "impossible shape"),
        (write.entry(FLOAT32, (0, 2**62), size=0), "impossible shape"),
        (write.entry(FLOAT32, (2**32, 2**32), size=24), "impossible shape"),
        (write.entry(FLOAT32, (2**40,), size=2**42), "24 bytes, but 'a' ends at 4398046511104"),
        (write.entry(FLOAT32, (1,) * 33, size=4), "more than 32 dimensions"),
        (write.entry(STRING, (2**60,), size=24), "impossible shape"),
        (write.integer(1, FLOAT32) + write.message(2, write.integer(3, 1)), "has no shape"),
        (ENTRY + write.message(7, b""), "has the partitioned variable 'a', which is not supp"),
        (ENTRY[:-1], "4 bytes expected, 3 left"),
        (ENTRY + b"\x0b", "unknown kind 3"),
        (ENTRY + write.varint(9 << 3 | 2) + write.varint(2**60), "bytes expected, 0 left"),
        (ENTRY + write.message(9, bytes(5000)), "the description of one variable has 50"),
    ],
)
def test_entries_that_cannot_be(tmp_path: Path, value: bytes, complaint: str) -> None:
    write.write_entries(tmp_path / "x", [(b"a", value)])
    with pytest.raises(CheckpointError, match=complaint):
        open_bundle(tmp_path / "x")


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (write.header(endianness=1), "has numbers in big-endian order, which is not supported"),
        (write.header(min_consumer=2), "has the format of version 2"),
        (write.header(shards=0), "it speaks of 0 shards"),
        (write.header(shards=-1), "it speaks of -1 shards"),
        (write.header(shards=2**40), "it speaks of 1099511627776 shards"),
        (b"\xff", "1 bytes expected, 0 left"),
        (write.header(shards=2**31 - 1), r"x\.data-00000-of-2147483647 is missing"),
    ],
)
def test_headers_that_cannot_be(tmp_path: Path, head: bytes, complaint: str) -> None:
    write.write_entries(tmp_path / "x", [(b"a", ENTRY)], head=head)
    with pytest.raises(CheckpointError, match=complaint):
        open_bundle(tmp_path / "x")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "it is empty"),
        ([(b"a", ENTRY)], "does not begin with a header"),
        ([(b"", write.header()), (b"\xff\xfe", ENTRY)], r"the key b'\\xff\\xfe' is not UTF-8"),
        ([(b"", write.header()), (b"\xed\xa0\x80", ENTRY)], "is not UTF-8"),
        ([(b"", write.header()), (b"\0a\0\1", ENTRY)], "has a piece of a partitioned variable"),
        ([(b"", write.header()), (b"", write.header())], "comes twice or out of order"),
        ([(b"", write.header()), (b"a", ENTRY), (b"a", ENTRY)], "comes twice or out of order"),
        ([(b"", write.header()), (b"b", ENTRY), (b"a", ENTRY)], "comes twice or out of order"),
        ([(b"", write.header()), (b"a", ENTRY), (b"b", ENTRY)], "'a' and 'b' share bytes"),
    ],
)
def test_tables_that_are_no_index(tmp_path: Path, rows: write.Rows, complaint: str) -> None:
    write.write_files(tmp_path / "x", write.table(rows)[0], [DATA])
    with pytest.raises(CheckpointError, match=complaint):
        open_bundle(tmp_path / "x")


def test_an_index_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write.write_entries(
        tmp_path / "x", [(b"a", ENTRY), (b"b", write.entry(FLOAT32, (0,), offset=24))]
    )
    monkeypatch.setattr("bigsimclr.interop.tf_bundle._VARIABLE_LIMIT", 1)
    with pytest.raises(CheckpointError, match="has more than 1 variables, which is not supported"):
        open_bundle(tmp_path / "x")
    monkeypatch.setattr("bigsimclr.interop.tf_bundle._VARIABLE_LIMIT", 2)
    assert list(open_bundle(tmp_path / "x").variables) == ["a", "b"]
    with (tmp_path / "x.index").open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="1099511627776 bytes where an index has at most"):
        open_bundle(tmp_path / "x")


def test_names_are_quoted_in_errors(tmp_path: Path) -> None:
    write.write_entries(tmp_path / "x", [(b"a\n\x1b[2J", _place(offset=1))])
    with pytest.raises(CheckpointError, match=r"'a\\n\\x1b\[2J' ends at 25") as caught:
        open_bundle(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write.write_bundle(tmp_path / "x", _variables(), shards=3)
    with pytest.raises(CheckpointError, match=r"y\.index is missing; a checkpoint is named by"):
        open_bundle(tmp_path / "y")
    bundle = open_bundle(tmp_path / "x")
    (tmp_path / "x.data-00001-of-00003").unlink()
    with pytest.raises(CheckpointError, match=r"x\.data-00001-of-00003 is missing"):
        open_bundle(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"x\.data-00001-of-00003 is missing"):
        bundle.read(list(bundle.variables)[1])


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
def test_what_is_no_file(tmp_path: Path, suffix: str) -> None:
    write.write_entries(tmp_path / "x", [(b"a", ENTRY)])
    file = tmp_path / f"x.{suffix}"
    file.unlink()
    makers = [
        (file.mkdir, "is not a regular file"),
        (lambda: os.mkfifo(file), "is not a regular file"),  # must not wait for a writer
        (lambda: file.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda: file.symlink_to(file), "cannot be read: Too many levels of symbolic links"),
    ]
    for make, complaint in makers:
        make()
        with pytest.raises(CheckpointError, match=complaint):
            open_bundle(tmp_path / "x")
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink()


def test_prefixes_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for prefix, complaint in (
        (tmp_path / "file" / "x", "cannot be read: Not a directory"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / "x\0y", "cannot be read: embedded null byte"),
        (tmp_path, "is missing"),
        (Path(), "is missing"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            open_bundle(prefix)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(tmp_path: Path) -> None:
    write.write_entries(tmp_path / "x", [(b"a", ENTRY)])
    (tmp_path / "x.index").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_bundle(tmp_path / "x")


def test_files_that_change_after_opening(tmp_path: Path) -> None:
    write.write_entries(tmp_path / "x", [(b"a", ENTRY)])
    bundle, shard = open_bundle(tmp_path / "x"), tmp_path / "x.data-00000-of-00001"
    shard.write_bytes(DATA[:-1])
    with pytest.raises(CheckpointError, match="ends at byte 23"):
        bundle.read("a")
    shard.write_bytes(DATA[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="the checksum of 'a' differs"):
        bundle.read("a")
    shard.write_bytes(DATA)
    assert bundle.read("a").shape == (2, 3)


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        (b"", "expected, 0 left"),
        (b"\3", "4 bytes expected, 0 left"),
        (b"\3\0\0\0\0abc", "checksum of the length of 't' differs"),
        (write.string_bytes([b"abc"])[0][:-1], "3 bytes expected, 2 left"),
        (write.string_bytes([b"abc"])[0] + b"d", "'t' is longer than its length"),
        (write.string_bytes([b"abd"])[0], "the checksum of 't' differs"),
        (write.varint(2**63) + struct.pack("<I", write.masked_crc(b"\0" * 7 + b"\x80")), "left"),
        (b"\xff" * 10, "more than 64 bits"),
    ],
)
def test_texts_that_cannot_be(tmp_path: Path, stored: bytes, complaint: str) -> None:
    crc = write.string_bytes([b"abc"])[1]
    row = (b"t", write.entry(STRING, (), size=len(stored), crc=crc))
    write.write_entries(tmp_path / "x", [row], data=stored)
    with pytest.raises(CheckpointError, match=complaint):
        open_bundle(tmp_path / "x").read_text("t")


def test_texts_have_bounds(tmp_path: Path) -> None:
    row = (b"t", write.entry(STRING, (), size=1 << 30))
    write.write_entries(tmp_path / "x", [row])
    with (tmp_path / "x.data-00000-of-00001").open("r+b") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="'t' has 1073741824 bytes, too many for a text"):
        open_bundle(tmp_path / "x").read_text("t")


# --- checkpoints that TensorFlow wrote -----------------------------------------------------------


@pytest.mark.golden
def test_official_tf1_checkpoints() -> None:
    stored = sorted(golden_dir().glob("ckpt_forward/*/weights_tf1_names.npz"))
    assert stored
    for file in stored:
        (index,) = (file.parent / "tf1").glob("*.index")
        bundle = open_bundle(index.with_suffix(""))
        with np.load(file) as arrays:
            for name in arrays.files:
                array = arrays[name]
                assert bundle.variables[name] == Variable(array.dtype.name, array.shape)
                assert bundle.read(name).tobytes() == array.tobytes(), name
            rest = set(bundle.variables) - set(arrays.files)
        assert all(name.endswith("/Momentum") for name in rest)
        assert int(bundle.read("global_step")) == int(index.stem.rpartition("-")[2])


@pytest.mark.golden
def test_official_tf2_checkpoints(tmp_path: Path) -> None:
    indices = sorted(golden_dir().glob("ckpt_forward/*/tf2/*.index"))
    for number, archive in enumerate(sorted(golden_dir().glob("ckpt_forward/*/tf2/*.tar.gz"))):
        unpack(archive, tmp_path / str(number))
    indices += sorted(tmp_path.rglob("variables.index"))
    assert len(indices) >= 4
    for index in indices:
        bundle = open_bundle(index.with_suffix(""))
        graph = bundle.read_text("_CHECKPOINTABLE_OBJECT_GRAPH")
        for name, variable in bundle.variables.items():
            if variable.dtype != "string":
                array = bundle.read(name)
                assert Variable(array.dtype.name, array.shape) == variable
                assert name.encode() in graph
