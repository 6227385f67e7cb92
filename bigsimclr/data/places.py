"""Paths that a recipe names: opened as their user means them, or refused by the key's name."""

import errno
import glob
import stat
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeVar

from bigsimclr.data.names import printable, some
from bigsimclr.errors import DataError

T = TypeVar("T")

# Errors that a network file system reports in passing; the others will not go away by waiting.
_PASSING: Final = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
_WAITS_SECONDS: Final = (0.1, 1.0)


def patiently(read: Callable[[], T]) -> T:
    """Call `read`, and twice more where its error may pass.

    Raises:
        OSError: it cannot be read.
    """
    for wait in _WAITS_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(wait)
    return read()


def expanded(path: Path, key: str) -> Path:
    """Resolve a leading `~`, which a shell leaves as it is behind `key=`.

    Raises:
        DataError: there is no such home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise DataError(f"{named(key)}{printable(str(path))}: there is no such home") from None


def named(key: str) -> str:
    """Begin a message with a recipe's key; with nothing when no recipe is meant."""
    return f"{key}: " if key else ""


def require_folder(path: Path, key: str, *, hint: str = "", missing_hint: str = "") -> None:
    """Check that `path` is a folder.

    Args:
        path: the folder.
        key: the recipe's key that names it; "" when it comes from elsewhere.
        hint: what to do when a file lies there.
        missing_hint: what to do when nothing lies there.

    Raises:
        DataError: it is missing, something else, or out of reach.
    """
    if not stat.S_ISDIR(_mode(path, key, missing_hint)):
        raise DataError(f"{named(key)}{printable(str(path))} is a file, not a folder{_tail(hint)}")


def is_folder_at(path: Path) -> bool:
    """Say whether a folder lies at `path`.

    Raises:
        DataError: what lies there is out of reach.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(f"{printable(str(path))}: {error.strerror}") from None


def require_file(path: Path, key: str, *, hint: str = "", missing_hint: str = "") -> None:
    """Check that `path` is a regular file; `hint` says what to do when a folder lies there.

    Raises:
        DataError: it is missing, something else, or out of reach.
    """
    mode = _mode(path, key, missing_hint)
    if stat.S_ISDIR(mode):
        raise DataError(f"{named(key)}{printable(str(path))} is a folder, not a file{_tail(hint)}")
    if not stat.S_ISREG(mode):
        raise DataError(f"{named(key)}{printable(str(path))} is not a regular file")


def matching_files(root: Path, pattern: str, *, key: str, what: str) -> list[Path]:
    """Find the files of a data set by a pattern, sorted.

    Args:
        root: the data set's folder.
        pattern: pattern of the files, relative to `root`.
        key: the recipe's key that names `pattern`.
        what: the kind of file in the plural, for messages.

    Raises:
        DataError: there are none, or it is not a pattern.
    """
    require_folder(
        root,
        "data.root",
        hint=f"give its folder as data.root and its name as {key}",
        missing_hint=f"give the folder of the {what} with data.root=DIR",
    )
    try:
        paths = sorted(path for path in root.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{key}: {pattern!r} is not a pattern relative to data.root") from error
    if not paths:
        held = sorted(path.name for path in root.iterdir())
        raise DataError(
            f"{key}: {printable(str(root))} has no files {printable(pattern)}; it holds"
            f" {some(held) if held else 'nothing'}"
        )
    return paths


def split_pattern(path: Path) -> tuple[Path, str]:
    """Cut the path of a file, or of several as a pattern, into a folder and the rest."""
    if path.is_file():
        return path.parent, glob.escape(path.name)
    parts = path.parts
    first = next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:first]), "/".join(parts[first:])


def refuse_overlap(train: Collection[Path], held_out: Collection[Path], *, pattern: str) -> None:
    """Refuse files that are trained on and measured on; `pattern` is that of the training files.

    Raises:
        DataError: there is one.
    """
    both = set(train) & set(held_out)
    if both:
        raise DataError(
            f"data.held_out: {printable(min(both).name)} matches data.train={printable(pattern)}"
            " too; held-out images must not be trained on"
        )


def _mode(path: Path, key: str, missing_hint: str) -> int:
    shown = printable(str(path))
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        place = "" if path.is_absolute() else " (relative to the current directory)"
        text = f"{named(key)}{shown} does not exist{place}{_tail(missing_hint)}"
        raise DataError(text) from None
    except OSError as error:
        raise DataError(f"{named(key)}{shown}: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{named(key)}{shown} is not a path") from None


def _tail(hint: str) -> str:
    return f"; {hint}" if hint else ""
