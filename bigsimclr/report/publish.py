"""Replace a file whole: readers see the old text or the new one, never a part."""

import os
import secrets
from pathlib import Path

from bigsimclr.errors import StorageError


def publish(path: Path, text: str) -> Path:
    """Write text beside `path`, flush it to the disk, then rename it into place.

    Args:
        path: the file to create or replace.
        text: its content; characters that UTF-8 cannot carry become question marks.

    Raises:
        StorageError: the directory is missing or cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        # "x" refuses to follow a link that somebody placed at this name.
        with beside.open("x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        reason = error.strerror or type(error).__name__
        raise StorageError(f"{path} cannot be written: {reason}") from error
    return path
