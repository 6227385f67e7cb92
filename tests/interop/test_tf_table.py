"""Tables and their numbers: what was written comes back, and nothing else does."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_table import ByteReader, crc32c, masked, table_entries
from tests.interop import write_bundle as write

PATH = Path("x.index")
ROWS = [(b"a%03d" % number, b"v" * number) for number in range(60)]


def test_checksums_are_those_of_the_definition() -> None:
    # RFC 3720, appendix B.4.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789") == 0xE3069283
    # The mask rotates by 15 bits and adds a constant.
    assert masked(0) == 0xA282EAD8
    assert masked(1) == 0xA284EAD8
    assert masked(0xFFFFFFFF) == 0xA282EAD7


@given(value=st.integers(0, 2**64 - 1))
def test_numbers_of_variable_length(value: int) -> None:
    reader = ByteReader(PATH, write.varint(value) + b"rest")
    assert reader.varint() == value
    assert reader.take(4) == b"rest"
    assert not reader.has_more


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\xff" * 9, b"\xff" * 9 + b"\x02", b"\xff" * 10, b"\x80" * 10 + b"\1"],
)
def test_numbers_without_end(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"64 bits|1 bytes expected, 0 left"):
        ByteReader(PATH, data).varint()


def test_fields_of_messages() -> None:
    content = (
        write.integer(1, -2) + write.message(2, b"text") + b"\x1d\1\0\0\0" + b"\x21" + b"\2" * 8
    )
    reader = ByteReader(PATH, content)
    assert [reader.field() for _ in range(4)] == [
        (1, -2),
        (2, b"text"),
        (3, 1),
        (4, int("02" * 8, 16)),
    ]
    assert not reader.has_more
    for kind in (3, 4, 6, 7):
        with pytest.raises(CheckpointError, match=f"unknown kind {kind}"):
            ByteReader(PATH, bytes([8 | kind])).field()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.dictionaries(st.binary(max_size=12), st.binary(max_size=40), max_size=40),
    block_bytes=st.integers(1, 300),
    restart_every=st.integers(1, 20),
)
def test_tables_come_back(rows: dict[bytes, bytes], block_bytes: int, restart_every: int) -> None:
    ordered = sorted(rows.items())
    content, _ = write.table(ordered, block_bytes=block_bytes, restart_every=restart_every)
    assert list(table_entries(PATH, content)) == ordered


def test_keys_are_compressed_and_blocks_are_many() -> None:
    content, spans = write.table(ROWS, block_bytes=200)
    assert len(spans) > 8
    assert content.count(b"a05") < 10
    assert list(table_entries(PATH, content)) == ROWS


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_foreign_bytes(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="the mark at its end is missing"):
        list(table_entries(PATH, content))
    with pytest.raises(CheckpointError):
        list(table_entries(PATH, content + write.footer((0, 4), (9, 4))))


@pytest.mark.parametrize("size", [0, 1, 8, 47, 48, -48, -8, -1])
def test_short_files(size: int) -> None:
    content, _ = write.table(ROWS)
    with pytest.raises(CheckpointError, match=r"^x\.index is damaged"):
        list(table_entries(PATH, content[:size]))


def test_every_block_is_verified() -> None:
    content, spans = write.table(ROWS, block_bytes=200)
    for start, size in spans:
        for at in (start, start + size // 2, start + size, start + size + 4):
            changed = bytearray(content)
            changed[at] ^= 0x10
            with pytest.raises(CheckpointError, match=f"the block at byte {start} differs"):
                list(table_entries(PATH, bytes(changed)))


def test_compressed_blocks() -> None:
    with pytest.raises(CheckpointError, match="has blocks compressed with snappy, which is not"):
        list(table_entries(PATH, write.table(ROWS, compression=1)[0]))
    with pytest.raises(CheckpointError, match="blocks in the unknown compression 7"):
        list(table_entries(PATH, write.table(ROWS, compression=7)[0]))


@pytest.mark.parametrize("rows", [[(b"b", b""), (b"a", b"")], [(b"a", b"1"), (b"a", b"2")]])
@pytest.mark.parametrize("block_bytes", [1, 4096])
def test_keys_out_of_order(rows: write.Rows, block_bytes: int) -> None:
    content, spans = write.table(rows, block_bytes=block_bytes)
    assert len(spans) == (4 if block_bytes == 1 else 3)
    with pytest.raises(CheckpointError, match="b'a' comes twice or out of order"):
        list(table_entries(PATH, content))


def _listing(handles: list[write.Span]) -> bytes:
    """A table of one block that is listed at other places."""
    only = write.block([(b"k", b"v")])
    content = write.sealed(only) + write.sealed(write.NO_RESTARTS)
    rows = [(b"k", write.varint(start) + write.varint(size)) for start, size in handles]
    listed = write.block(rows, restart_every=1)
    place = len(content), len(listed)
    return content + write.sealed(listed) + write.footer((len(only) + 5, 4), place)


def test_blocks_elsewhere() -> None:
    size = len(write.block([(b"k", b"v")]))
    assert list(table_entries(PATH, _listing([(0, size)]))) == [(b"k", b"v")]
    with pytest.raises(CheckpointError, match="blocks overlap"):
        list(table_entries(PATH, _listing([(0, size), (0, size)])))
    far = [(2**63, 4), (0, 2**64 - 1), (2**64 - 1, 2**64 - 1), (10**6, 0), (0, size + 1), (1, size)]
    for handle in far:
        with pytest.raises(CheckpointError, match=r"expected|differs"):
            list(table_entries(PATH, _listing([handle])))


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        (b"", "4 bytes expected"),
        (b"\0\0", "4 bytes expected"),
        (b"\xff\xff\xff\xff", "shorter than its list of restarts"),
        (b"\1\0\0\0", "shorter than its list of restarts"),
        (b"\1\1\0k" + write.NO_RESTARTS, "shares more bytes"),
        (b"\0\1\0" + write.NO_RESTARTS, "1 bytes expected, 0 left"),
        (b"\0\1\5kv" + write.NO_RESTARTS, "5 bytes expected, 1 left"),
        (b"\0" + write.varint(2**63) + b"\0k" + write.NO_RESTARTS, "bytes expected, 1 left"),
        (b"\0\1" + write.NO_RESTARTS, "1 bytes expected"),
        (write.block([(b"k" * 1025, b"")]), "a key has more than 1024 bytes"),
    ],
)
def test_blocks_that_are_wrong_inside(block: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        list(table_entries(PATH, write.table_of(block)))
