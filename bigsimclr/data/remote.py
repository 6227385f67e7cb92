"""Shards at a URL, copied whole to a folder of this machine when they are first needed."""

import fcntl
import hashlib
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from bigsimclr.data.names import printable
from bigsimclr.data.pack_file import NAME, PackFile, parse_pack
from bigsimclr.data.shard_index import (
    ShardIndex,
    index_path,
    index_shard,
    read_index,
    stamp_of,
)
from bigsimclr.errors import BigSimCLRError, DataError, MissingExtraError, StorageError
from bigsimclr.storage import whole_file

try:
    import fsspec
except ImportError as error:
    raise MissingExtraError(
        "data.remote needs the package fsspec: pip install 'bigsimclr[remote]'"
    ) from error

T = TypeVar("T")

_KEY: Final = "data.remote"
_PIECE_BYTES: Final = 8 << 20
_WAITS_SECONDS: Final = (1.0, 5.0)


@dataclass
class RemoteShards:
    """The shards of a folder at a URL, and the local folder that keeps copies.

    No connection is kept: those of many protocols do not survive a fork.
    """

    url: str
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)  # bytes at the URL, by relative name
    stamps: dict[str, str] = field(default_factory=dict)  # as the shards' indexes have them
    hashes: dict[str, str] = field(default_factory=dict)  # sha256, as a pack's file has them

    def find(self, pattern: str, *, key: str) -> list[str]:
        """List the shards that match a pattern, by relative name.

        Raises:
            DataError: there are none, the URL cannot be read, or a pack there is not whole.
        """
        sizes = self._asked(lambda: self._sizes(pattern))
        if not sizes:
            raise DataError(f"{key}: {printable(self.url)} has no files {printable(pattern)}")
        for name in sizes:
            if name.startswith("/") or {"..", ""} & set(name.split("/")):
                raise DataError(f"{_KEY}: {printable(self.url)} lists '{printable(name)}'")
        self.sizes |= sizes
        for folder in sorted({posixpath.dirname(name) for name in sizes}):
            self._note_pack(folder)
        return sorted(sizes)

    def index(self, name: str) -> tuple[ShardIndex, bool]:
        """Read the index of a shard: of its copy, or of the URL; else copy the shard for it.

        Returns:
            The index, and whether it is kept in a file.

        Raises:
            DataError: neither can be read.
        """
        path = self.folder / name
        if path.exists():
            if path.stat().st_size != self.sizes[name]:
                raise DataError(
                    f"{_KEY}: {printable(str(path))} is not a copy of"
                    f" {printable(f'{self.url}/{name}')}, which has {self.sizes[name]:,} bytes;"
                    " remove it, or name another data.root"
                )
            found = index_shard(path)
        else:
            stored = read_index(index_path(path))
            if stored is None or stored.bytes != self.sizes[name]:
                self._copy_index(name)
                stored = read_index(index_path(path))
            if stored is None or stored.bytes != self.sizes[name]:
                self.fetch(name)
                found = index_shard(path)
            else:
                found = stored, True
        self.stamps[name] = found[0].stamp
        return found

    def fetch(self, name: str) -> None:
        """See that a shard's copy is there, whole and the one that was indexed.

        Raises:
            DataError: it is another one.
            StorageError: it cannot be copied.
        """
        path, size = self.folder / name, self.sizes[name]
        with _alone(path):
            if path.is_file() and path.stat().st_size == size:
                return  # another process was faster
            with whole_file(path, overwrite=True) as beside:
                try:
                    digest = self._asked(lambda: self._copy(name, beside))
                except DataError as error:
                    # No image is to blame, and none may stand for those that cannot be copied.
                    raise StorageError(str(error)) from error
                found = stamp_of(beside)
                stamp, sha256 = self.stamps.get(name, found[1]), self.hashes.get(name, digest)
                if found != (size, stamp) or digest != sha256:
                    raise DataError(
                        f"{_KEY}: {printable(f'{self.url}/{name}')} is not the shard that was"
                        f" indexed: {found[0]:,} bytes of {size:,}; remove"
                        f" {printable(str(index_path(path)))} if it was replaced"
                    )

    def _copy(self, name: str, to: Path) -> str:
        """Copy a file and return its sha256."""
        digest = hashlib.sha256()
        files, root = fsspec.core.url_to_fs(self.url)
        with files.open(posixpath.join(root, name), "rb") as source, to.open("wb") as target:
            while piece := source.read(_PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
        return digest.hexdigest()

    def _copy_index(self, name: str) -> None:
        there = f"{name}.index"
        if self._asked(lambda: self._exists(there)):
            with whole_file(self.folder / there, overwrite=True) as beside:
                self._asked(lambda: self._copy(there, beside))

    def _note_pack(self, folder: str) -> None:
        """Take the hashes of a pack's shards from the file that lists them."""
        there = posixpath.join(folder, NAME)
        if not self._asked(lambda: self._exists(there)):
            return
        pack = parse_pack(self._asked(lambda: self._content(there)), f"{self.url}/{there}")
        self._check(pack, folder)
        self.hashes |= {posixpath.join(folder, file.name): file.sha256 for file in pack.files}

    def _check(self, pack: PackFile, folder: str) -> None:
        shown = printable(posixpath.join(self.url, folder))
        if not pack.files:
            raise DataError(f"{_KEY}: {shown}: packing was not finished")
        # The pattern may leave some of them out; they must be there all the same.
        there = self._asked(lambda: self._sizes(posixpath.join(folder, "*.tar")))
        for file in pack.files:
            size = there.get(posixpath.join(folder, file.name))
            if size is None:
                raise DataError(f"{_KEY}: {shown}: {printable(file.name)} of the pack is not there")
            if size != file.bytes:
                raise DataError(f"{_KEY}: {shown}: {printable(file.name)} has {size:,} bytes")

    def _sizes(self, pattern: str) -> dict[str, int]:
        """Return the bytes of all files that a pattern matches, by their names."""
        files, root = fsspec.core.url_to_fs(self.url)
        found = files.glob(posixpath.join(root, pattern), detail=True)
        front = root.rstrip("/") + "/"
        return {
            path.removeprefix(front): int(facts["size"])
            for path, facts in found.items()
            if facts["type"] == "file"
        }

    def _exists(self, name: str) -> bool:
        files, root = fsspec.core.url_to_fs(self.url)
        return bool(files.isfile(posixpath.join(root, name)))

    def _content(self, name: str) -> bytes:
        files, root = fsspec.core.url_to_fs(self.url)
        return bytes(files.cat_file(posixpath.join(root, name)))

    def _asked(self, ask: Callable[[], T]) -> T:
        """Ask the remote side, again where it may have been a passing fault."""
        for wait in (*_WAITS_SECONDS, None):
            try:
                return ask()
            except BigSimCLRError:
                raise
            except Exception as error:
                # Every protocol has errors of its own.
                if wait is None or isinstance(error, ImportError | FileNotFoundError | ValueError):
                    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    raise DataError(f"{_KEY}: {printable(self.url)}: {printable(text)}") from error
                time.sleep(wait)
        raise AssertionError


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine copies the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
