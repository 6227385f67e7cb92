"""One writer per run directory: a lock that the operating system frees when its holder dies."""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bigsimclr.errors import StorageError

_log = logging.getLogger(__name__)

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Descriptors of held locks. Forked workers inherit them, and a worker that outlives a killed
# trainer would keep the directory locked; so every child closes them.
_held: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold_run(directory: Path) -> Iterator[Callable[[], None]]:
    """Create a run directory, prove that it can be written, and hold it against other processes.

    Args:
        directory: the run directory; its parents are created as well.

    Yields:
        A fence: call it before anything is published. It raises StorageError when another process
        has taken the directory over, as it can on a file system without locks.

    Raises:
        StorageError: the directory cannot be written, or another process holds it.
    """
    if not str(directory).isprintable():
        raise StorageError(f"{str(directory)!r} holds control characters; use another --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(directory)
    except StorageError:
        raise
    except OSError as error:
        raise _unwritable(directory, error) from error
    _held.add(descriptor)
    try:
        try:
            signature = _sign(descriptor)
            _probe(directory)
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield partial(_check_signature, directory, signature)
    finally:
        # A forked child has closed it already; the number may be another file there by now.
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


def _locked(directory: Path) -> int:
    """Open and lock `.lock`; the descriptor carries the lock until it is closed."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            _log.warning(
                "%s is on a file system without locks; start no second run there", directory
            )
            return descriptor
        holder = _holder(descriptor)
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise StorageError(f"{directory} is in use by {holder}; use another --out") from error
    return descriptor


def _sign(descriptor: int) -> bytes:
    """Say who holds the lock, for the message that a second process prints, and for the fence."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "nonce": secrets.token_hex(8)}
    content = json.dumps(holder).encode() + b"\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    return content


def _check_signature(directory: Path, signature: bytes) -> None:
    try:
        found = (directory / ".lock").read_bytes()
    except OSError as error:
        raise _unwritable(directory, error) from error
    if found != signature:
        raise StorageError(
            f"{directory} was taken over by another process while this one ran; nothing more is "
            "written by this one"
        )


def _holder(descriptor: int) -> str:
    try:
        signature: object = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        signature = None
    match signature:
        case {"pid": int(pid), "host": str(host)} if host.isprintable():
            return f"process {pid} on {host}"
        case _:
            return "another process"


def _probe(directory: Path) -> None:
    """Do once what every checkpoint does: write, sync, rename, delete."""
    probe, renamed = directory / ".probe", directory / ".probe-renamed"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(probe, flags, 0o600)
    try:
        os.write(descriptor, b"probe")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    probe.replace(renamed)
    renamed.unlink()


def _unwritable(directory: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write to {directory}: {error.strerror or error}")
