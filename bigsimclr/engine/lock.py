"""One writer per run directory: a lock that the operating system frees when its holder dies.

`.lock` is locked and signed by its holder. Slurm may lose sight of a machine, and start its job
again elsewhere, while the holder lives on and keeps the lock. The later start of the same job then
puts a file of its own at the place of `.lock`; the earlier holder keeps a file without a name, and
its fence lets nothing more out. Whoever looks at `.lock` or changes it holds `.lock-turn` for that
moment, so that what is found there is the signature of its present holder.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from bigsimclr.errors import StorageError
from bigsimclr.world import Job

_log = logging.getLogger(__name__)

TURN_SECONDS: Final = 10.0
"""Seconds to wait while others start here; each takes milliseconds."""
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW

# Descriptors of held locks. Forked workers inherit them, and a worker that outlives a killed
# trainer would keep the directory locked; so every child closes them.
_held: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold_run(directory: Path, *, job: Job | None = None) -> Iterator[Callable[[], None]]:
    """Create a run directory, prove that it can be written, and hold it against other processes.

    Args:
        directory: the run directory; its parents are created as well.
        job: this process's Slurm job, which takes over from its own earlier starts.

    Yields:
        A fence: call it right before anything is published. It raises StorageError when another
        process has taken the directory over: a later start of the same job, or any on a file
        system without locks. It cannot hold back what stood still after the call for so long.

    Raises:
        StorageError: the directory cannot be written, or another process holds it.
    """
    if not str(directory).isprintable():
        raise StorageError(f"{str(directory)!r} holds control characters; use another --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _turn(directory):
            descriptor, signature = _acquire(directory, job)
    except StorageError:
        raise
    except OSError as error:
        raise _unwritable(directory, error) from error
    _held.add(descriptor)
    try:
        try:
            _probe(directory)
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield partial(_check_signature, directory, signature)
    finally:
        # A forked child has closed it already; the number may be another file there by now.
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Let one process at a time find out who holds a directory, and change it."""
    descriptor = os.open(directory / ".lock-turn", _OPEN, 0o600)
    try:
        deadline = time.monotonic() + TURN_SECONDS
        while _lock(descriptor) is False:
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"{directory} is in use by another process, which has not come to its start "
                    f"for {TURN_SECONDS:g} s; use another --out"
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Say whether the file was free, and is ours until it is closed; None: no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _acquire(directory: Path, job: Job | None) -> tuple[int, bytes]:
    """Lock and sign `.lock`; the descriptor carries the lock until it is closed."""
    descriptor = os.open(directory / ".lock", _OPEN, 0o600)
    try:
        free = _lock(descriptor)
        if free is None:
            _log.warning(
                "%s is on a file system without locks; start no second run there", directory
            )
        if free is not False:
            return descriptor, _sign(descriptor, job)
        holder, its_job = _holder(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    if (
        job is None
        or its_job is None
        or job.number != its_job.number
        or job.restart <= its_job.restart
    ):
        raise StorageError(f"{directory} is in use by {holder}; use another --out")
    _log.warning("%s is taken over from %s, an earlier start of this job", directory, holder)
    return _take_over(directory, job)


def _take_over(directory: Path, job: Job) -> tuple[int, bytes]:
    """Put another file at the place of `.lock`, locked and signed before anybody sees it."""
    beside = directory / ".lock-next"  # one name, so that a killed process leaves one at most
    descriptor = os.open(beside, _OPEN, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        signature = _sign(descriptor, job)
        beside.replace(directory / ".lock")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, signature


def _sign(descriptor: int, job: Job | None) -> bytes:
    """Say who holds the lock, for the message that a second process prints, and for the fence."""
    holder: dict[str, object] = {"pid": os.getpid(), "host": socket.gethostname()}
    if job is not None:
        holder |= {"job": job.number, "restart": job.restart}
    content = json.dumps({**holder, "nonce": secrets.token_hex(8)}).encode() + b"\n"
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


def _holder(descriptor: int) -> tuple[str, Job | None]:
    """Return who signed a lock, in words, and as part of which job."""
    try:
        signature: object = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        signature = None
    match signature:
        case {"pid": int(pid), "host": str(host)} if host.isprintable():
            words = f"process {pid} on {host}"
        case _:
            return "another process", None
    match signature:
        case {"job": str(number), "restart": int(restart)} if number.isprintable():
            again = f", restart {restart}" if restart else ""
            return f"{words} (Slurm job {number}{again})", Job(number, restart)
        case _:
            return words, None


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
