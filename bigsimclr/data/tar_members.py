"""Where the members of a tar archive lie: headers read by offset, nothing ever extracted.

Understood are the formats that tar programs write: v7, ustar, GNU (long names, sizes beyond
8 GiB) and PAX. An archive is data from elsewhere, so whatever does not add up is refused by name.

Source: POSIX.1-2017, pax Interchange Format; the GNU tar manual, "Basic Tar Format".
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bigsimclr.data.names import printable
from bigsimclr.errors import DataError

BLOCK: Final = 512
_WINDOW: Final = 4096  # bytes per read: a header, often with a small member and the next header
_MOST_FILLING_BYTES: Final = 1 << 20  # behind the members: two blocks, filled up to a record
_MOST_EXTENSION_BYTES: Final = 1 << 20  # of a long name or of PAX records
_LINKS: Final = frozenset(b"12")
_WITHOUT_CONTENT: Final = frozenset(b"123456")
_REGULAR: Final = frozenset(b"0\x007")
_ZEROS: Final = bytes(BLOCK)


@dataclass(frozen=True)
class TarMember:
    """One regular file of an archive."""

    name: str  # as stored, below the archive's root
    offset: int  # of its content in bytes; its header is the block before
    size: int  # bytes of content


@dataclass(frozen=True)
class OtherMember:
    """An entry that is no regular file: its kind, for messages."""

    name: str
    kind: str  # "link", "folder" or "special"


class TarFile:
    """Read an archive by offset through one descriptor, a window at a time."""

    def __init__(self, descriptor: int, size: int, shown: str) -> None:
        self._descriptor = descriptor
        self._size = size
        self._shown = shown  # the archive's name in messages
        self._start = 0
        self._window = b""

    def members(self) -> Iterator[TarMember | OtherMember]:
        """Yield every entry, in the order of the archive.

        Raises:
            DataError: the archive is truncated, damaged, has sparse members, or one escapes it.
            OSError: it cannot be read.
        """
        at, extension = 0, _Extension()
        while True:
            block = self.read(at, BLOCK)
            if len(block) < BLOCK:
                raise self._truncated("it has no end mark", at)
            if block == _ZEROS:
                self._check_rest(at)
                return
            header = self._header(block, at)
            kind = block[156]
            if kind in b"xgLK":
                content = self._extension_content(header.size, at)
                extension = extension.with_records(kind, content, self._damaged)
                at += BLOCK + _padded(header.size)
                continue
            if kind == ord("S") or extension.is_sparse:
                raise DataError(f"{self._shown}: member {_quoted(header.name)} is sparse")
            name = header.name if extension.name is None else extension.name
            size = header.size if extension.size is None else extension.size
            if kind in _WITHOUT_CONTENT:
                size = 0
            self._check_name(name)
            at += BLOCK
            if at + size > self._size:
                missing = at + size - self._size
                raise self._truncated(f"member {_quoted(name)} lacks {missing:,} bytes", at)
            # Old programs mark a folder by the slash at the end of its name alone.
            if kind in _REGULAR and not name.endswith("/"):
                yield TarMember(name, at, size)
            else:
                yield OtherMember(name, _other_kind(kind, name))
            at += _padded(size)
            extension = _Extension()

    def _check_rest(self, at: int) -> None:
        """Refuse what is no filling: a hole in a file begins as an end mark does."""
        rest = self._size - at
        if rest > _MOST_FILLING_BYTES:
            raise self._damaged(f"an end mark at byte {at:,}, and {rest:,} bytes behind it")
        for place in range(at, self._size, _WINDOW):
            count = min(_WINDOW, self._size - place)
            if self.read(place, count) != bytes(count):
                raise self._damaged(f"an end mark at byte {at:,}, and more members behind it")

    def read(self, at: int, count: int) -> bytes:
        """Return `count` bytes from offset `at`; fewer at the archive's end."""
        end = min(at + count, self._size)
        if not self._start <= at <= end <= self._start + len(self._window):
            self._start = at
            self._window = read_at(self._descriptor, at, max(count, _WINDOW))
        return self._window[at - self._start : end - self._start]

    def _header(self, block: bytes, at: int) -> TarMember:
        stored = _number(block[148:156])
        # The checksum is taken with its own field as spaces; old programs added signed bytes.
        body = block[:148] + b" " * 8 + block[156:]
        total = sum(body)
        if stored != total and stored != total - 256 * sum(byte > 127 for byte in body):
            raise self._damaged(f"no header at byte {at:,}")
        name = _text(block[:100])
        # GNU tar keeps other things where POSIX has the front of a long name.
        if block[257:263] == b"ustar\x00" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
        size = _number(block[124:136])
        if size is None or size < 0:
            raise self._damaged(f"member {_quoted(name)} declares no size")
        return TarMember(name, at + BLOCK, size)

    def _extension_content(self, size: int, at: int) -> bytes:
        if size > _MOST_EXTENSION_BYTES:
            raise self._damaged(f"an extended header at byte {at:,} declares {size:,} bytes")
        content = self.read(at + BLOCK, size)
        if len(content) < size:
            raise self._truncated(f"an extended header at byte {at:,} is cut off", at)
        return content

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            raise DataError(f"{self._shown}: member {_quoted(name)} escapes the shard")
        if not name or "\0" in name:
            raise self._damaged(f"member {_quoted(name)} has no usable name")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._shown} is damaged: {what}")

    def _truncated(self, what: str, at: int) -> DataError:
        return DataError(f"{self._shown} is truncated after {min(at, self._size):,} bytes: {what}")


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading; returns its descriptor and its size in bytes.

    Raises:
        OSError: it cannot be opened.
        DataError: it is not a regular file.
    """
    # Without waiting: a pipe that took the file's place would block for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise DataError(f"{printable(str(path))} is not a regular file")
    return descriptor, status.st_size


def read_at(descriptor: int, offset: int, count: int) -> bytes:
    """Read `count` bytes from `offset` without moving the descriptor; fewer at the file's end."""
    content = os.pread(descriptor, count, offset)
    # One call returns less than asked for beyond 2 GiB, or when a signal comes.
    while len(content) < count:
        more = os.pread(descriptor, count - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


def tar_header(name: str, size: int) -> bytes:
    """Write the ustar header of a small regular file; the same bytes on every machine.

    Args:
        name: at most 100 ASCII characters.
        size: bytes of content, below 8 GiB.
    """
    if len(name) > 100 or not 0 <= size < 1 << 33:
        raise ValueError(f"{name!r} of {size} bytes does not fit a plain header")
    fields = (
        name.encode("ascii").ljust(100, b"\0")
        + b"0000644\0"  # mode
        + b"0000000\0" * 2  # owner and group
        + b"%011o\0" % size
        + b"%011o\0" % 0  # time of the last change
        + b" " * 8  # the checksum's place
        + b"0"
        + bytes(100)
        + b"ustar\x0000"
    ).ljust(BLOCK, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def tar_padding(size: int) -> bytes:
    """Return what fills the last block of a member of `size` bytes."""
    return bytes(_padded(size) - size)


@dataclass(frozen=True)
class _Extension:
    """What extended headers say of the next member."""

    name: str | None = None
    size: int | None = None
    is_sparse: bool = False

    def with_records(
        self,
        kind: int,
        content: bytes,
        damaged: Callable[[str], DataError],
    ) -> "_Extension":
        if kind == ord("L"):
            return replace(self, name=_text(content))
        if kind == ord("K"):
            return self  # the target of a link, and links are left out
        found = self
        for keyword, value in _records(content, damaged):
            if keyword == b"path":
                found = replace(found, name=os.fsdecode(value))
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 20:
                    raise damaged(f"a PAX header declares the size {_quoted(os.fsdecode(value))}")
                found = replace(found, size=int(value))
            elif keyword.startswith(b"GNU.sparse"):
                found = replace(found, is_sparse=True)
        if kind == ord("g") and found != self:
            raise damaged("one PAX header names all members")
        return found


def _records(content: bytes, damaged: Callable[[str], DataError]) -> Iterator[tuple[bytes, bytes]]:
    """Yield PAX records: each its own length in decimal, a space, KEYWORD=VALUE, a line break."""
    at = 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[at : at + length]
        keyword, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not space or not equals or len(record) < length or value[-1:] != b"\n":
            raise damaged("a PAX header cannot be read")
        yield keyword, value[:-1]
        at += length


def _number(field: bytes) -> int | None:
    """Read a number: octal text, or big-endian binary behind a mark; None where it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    text = field.replace(b"\0", b" ").strip()
    try:
        return int(text, 8) if text else None
    except ValueError:
        return None


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _other_kind(kind: int, name: str) -> str:
    if kind in _LINKS:
        return "link"
    return "folder" if kind == ord("5") or name.endswith("/") else "special"


def _quoted(name: str) -> str:
    shown = printable(name)
    return f"'{shown if len(shown) <= 100 else shown[:100] + '...'}'"
