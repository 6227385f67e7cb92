"""Image names: stored compactly, printed safely, hashed into fingerprints."""

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class NameTable:
    """Hold many names in two buffers instead of one Python object each.

    Worker processes share the parent's memory until it is written to, and touching a Python
    object writes its reference count: a list of a million names would be copied into every worker.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.content = b"".join(encoded)
        lengths = np.fromiter((len(name) for name in encoded), dtype=np.int64, count=len(encoded))
        self._ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return os.fsdecode(self.content[start:end])

    def take(self, rows: NDArray[np.int64]) -> "NameTable":
        """Return the names of `rows`, in that order."""
        return NameTable(self[int(row)] for row in rows)


def printable(name: str) -> str:
    """Escape what a terminal would act on: control characters, direction marks, broken UTF-8."""
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii")
        for mark in name
    )


def counted(count: int, one: str, many: str = "") -> str:
    """Write a number with its noun: `1 image`, `2 images`; `many` where the plural is irregular."""
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"


def some(names: Sequence[str], *, shown: int = 3) -> str:
    """Join the first few names for a message."""
    listed = ", ".join(printable(name) for name in names[:shown])
    return f"{listed}, ..." if len(names) > shown else listed


def fingerprint(parts: Iterable[bytes]) -> str:
    """Hash parts, each with its length so that their borders count. Returns sha256 in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
