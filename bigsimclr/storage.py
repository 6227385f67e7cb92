"""Files that readers see whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bigsimclr.errors import StorageError


@contextmanager
def whole_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new, empty file beside `path`; it is flushed and takes that name when all went well.

    The place is tried before the work begins. Folders on the way are made.

    Args:
        path: the file to create.
        overwrite: whether a file that is there already is replaced.

    Raises:
        StorageError: the file is there already, or the place cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    if path.is_dir():
        raise StorageError(f"{path} is a directory; name a file")
    if not overwrite:
        _require_free(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise StorageError(f"{path.parent} is a file, not a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield beside
        _flush(beside)
        if not overwrite:
            _require_free(path)  # it may have come since the work began
        beside.replace(path)
    except StorageError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        beside.unlink(missing_ok=True)


def publish(path: Path, text: str, *, overwrite: bool = True) -> Path:
    """Write a text file whole.

    Args:
        path: the file to create or replace.
        text: its content; characters that UTF-8 cannot carry become question marks.
        overwrite: whether a file that is there already is replaced.

    Raises:
        StorageError: the file is there already, or the place cannot be written.
    """
    with whole_file(path, overwrite=overwrite) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def flush_folder(path: Path) -> None:
    """See that the names of a folder are on the disk, where its file system can say so."""
    with suppress(OSError):
        _flush(path)


def _require_free(path: Path) -> None:
    if os.path.lexists(path):
        raise StorageError(f"{path} exists already; choose another name")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror or type(error).__name__}")
