"""Which images a folder holds, found by walking through it."""

import errno
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data.names import printable, some
from bigsimclr.data.places import named
from bigsimclr.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES: Final = frozenset(
    {
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm"),
        *(".tif", ".tiff", ".gif"),
    }
)
# Clocks of file systems may be as coarse as that.
_SETTLED_NANOSECONDS: Final = 3_000_000_000

_KINDS: Final = (
    (stat.S_ISFIFO, "a pipe, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
)


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    names: list[str]  # sorted by their bytes, the same order under every locale
    sizes: NDArray[np.int64]  # [N] bytes
    # Folders on the way, with or without images, and when each last changed in nanoseconds; 0
    # where that was too recent to tell. "" is the folder itself.
    folders: dict[str, int]
    left_out: dict[str, str]  # name -> reason, of entries with names of images that are no files
    skipped: dict[str, int] = field(default_factory=dict)  # suffix -> files with other names

    @property
    def inner(self) -> list[str]:
        """List the sub-folders of the first level."""
        return [folder for folder in self.folders if folder and "/" not in folder]


def walk_folder(path: Path, key: str) -> Listing:
    """Find the images below a folder, whatever links lead to.

    Args:
        path: the folder.
        key: the recipe's key that names it, for messages; "" when it is not a recipe's.

    Raises:
        DataError: there are no images, or a folder cannot be read.
    """
    found = walk(path)
    if not found.names:
        raise DataError(named(key) + _nothing_found(path, found.skipped, has_key=bool(key)))
    return found


def walk(path: Path) -> Listing:
    """Find the images below a folder, if there are any.

    Raises:
        DataError: a folder cannot be read.
    """
    sizes: dict[str, int] = {}
    others: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    folders: dict[str, int] = {}
    for entry, name in _walk(path, folders):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in SUFFIXES:
            others[suffix or "no suffix"] += 1
            continue
        try:
            status = entry.stat()
        except OSError as error:
            left_out[name] = _why(entry, error)
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[name] = status.st_size
        else:
            kinds = (words for is_kind, words in _KINDS if is_kind(status.st_mode))
            left_out[name] = next(kinds, "not a regular file")
    names = sorted(sizes, key=os.fsencode)
    lengths = np.array([sizes[name] for name in names], np.int64)
    return Listing(names, lengths, folders, left_out, dict(others.most_common()))


def warn_of_left_out(found: Listing, path: Path) -> None:
    """Log which entries of a folder were left out, if there are any."""
    if found.left_out:
        names = sorted(found.left_out)
        logger.warning(
            "%s: %s left out: %s",
            printable(str(path)),
            "1 entry has the name of an image, is not a file, and is"
            if len(names) == 1
            else f"{len(names)} entries have names of images, are not files, and are",
            some(names),
        )


def first_level(path: Path) -> list[os.DirEntry[str]]:
    """List what lies in a folder, sorted by name; what begins with a dot is hidden.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{printable(str(path))}: {error.strerror}") from error
    return sorted(shown, key=lambda entry: os.fsencode(entry.name))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Say whether an entry is a folder, or a link to one, that can be entered."""
    try:
        return entry.is_dir()
    except OSError:
        # A link in a circle, or into a folder that is closed to us.
        return False


def _why(entry: os.DirEntry[str], error: OSError) -> str:
    if error.errno == errno.ENOENT and entry.is_symlink():
        return "a link to nothing"
    if error.errno == errno.ELOOP:
        return "a link that leads to itself"
    return error.strerror or "cannot be read"


def _walk(root: Path, folders: dict[str, int]) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield all files below a folder with their relative path; each folder is visited once.

    All folders are added to `folders` with the time of their last change.
    """
    status = root.stat()
    visited = {(status.st_dev, status.st_ino)}
    folders[""] = _changed(status)
    waiting = [("", str(root))]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                # Folders before links to them, which are then found to be visited already.
                entries = sorted(
                    listing, key=lambda entry: (entry.is_symlink(), os.fsencode(entry.name))
                )
        except OSError as error:
            raise DataError(f"{printable(folder)}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not is_folder(entry):
                yield entry, prefix + entry.name
                continue
            # A link may lead back to a folder above: its device and number give it away.
            status = entry.stat()
            is_new = (status.st_dev, status.st_ino) not in visited
            if is_new or not prefix:
                folders[prefix + entry.name] = _changed(status)
            if is_new:
                visited.add((status.st_dev, status.st_ino))
                waiting.append((f"{prefix}{entry.name}/", entry.path))


def _changed(status: os.stat_result) -> int:
    """Return when a folder last changed, 0 where it may yet change within the same moment."""
    is_recent = time.time_ns() - status.st_mtime_ns < _SETTLED_NANOSECONDS
    return 0 if is_recent else status.st_mtime_ns


def _nothing_found(path: Path, others: Mapping[str, int], *, has_key: bool) -> str:
    text = f"{printable(str(path))} holds 0 images ({' '.join(sorted(SUFFIXES))})"
    if not others:
        return f"{text}; it has no other files either"
    most = list(others.items())[:3]
    seen = ", ".join(f"{count} x {printable(suffix)}" for suffix, count in most)
    packed = [suffix for suffix in (".tar", ".parquet") if suffix in others and not has_key]
    hint = f"; data scan takes '{printable(str(path))}/**/*{packed[0]}'" if packed else ""
    return f"{text}; it has other files: {seen}{hint}"
