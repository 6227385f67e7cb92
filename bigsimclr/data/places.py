"""Paths that a recipe names: opened as their user means them, or refused by the key's name."""

import stat
from pathlib import Path

from bigsimclr.data.names import printable
from bigsimclr.errors import DataError


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
