"""Worker processes that prepare pieces of work in order, and die with the training process."""

import contextlib
import ctypes
import math
import resource
import signal
import threading
import warnings
from collections.abc import Generator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from bigsimclr.errors import DataError

T = TypeVar("T")

_OPEN_FILES = 65_536
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_KEPT_BYTES = 256 << 20


def _allow_open_files() -> None:
    # Every chunk that waits in shared memory is an open file; the usual 1,024 end a big batch.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard or hard == resource.RLIM_INFINITY:
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def under_way(*, workers: int, ahead: int) -> int:
    """Count the items that are prepared, waiting or on their way while the next one is awaited."""
    return workers * _each(workers, ahead)


def _each(workers: int, ahead: int) -> int:
    return max(2, math.ceil(ahead / workers))


def from_workers(
    reader: Dataset[T], count: int, *, workers: int, ahead: int
) -> Generator[T, None, None]:
    """Yield the items of a data set in order, prepared by worker processes.

    Close the generator where an error ends its use: while the error lives, its traceback would
    keep the workers, who ignore requests to stop, and the process could not exit.

    Args:
        reader: the items, by number from 0.
        count: how many there are.
        workers: processes, at least 1.
        ahead: items prepared ahead, by all workers together.

    Raises:
        DataError: a worker process died.
    """
    _allow_open_files()
    with warnings.catch_warnings():
        # The recipe says how many workers; more than cores is right where the disk is slow.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        with _own_signals():
            chunks = iter(_worker_loader(reader, workers, ahead))
    for _ in range(count):
        try:
            yield next(chunks)
        except RuntimeError as error:
            # Errors raised by code in a worker read "Caught ... in DataLoader worker".
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a process that reads images died: {str(error).strip()}"
                " Usual causes: too little memory or shared memory; lower input.workers or"
                " input.prefetch_batches"
            ) from error


@contextlib.contextmanager
def _own_signals() -> Generator[None, None, None]:
    """Keep PyTorch from raising a worker's death wherever the training process happens to be.

    It is noticed when the next item is awaited, within PyTorch's five seconds.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _worker_loader(reader: Dataset[T], workers: int, ahead: int) -> DataLoader[T]:
    return DataLoader(
        reader,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=_each(workers, ahead),
        worker_init_fn=_start_worker,
        # A fork shares the source's memory with all workers and starts in milliseconds.
        multiprocessing_context="fork",
        # Without its own generator the DataLoader would advance the global one.
        generator=torch.Generator(),
    )


def _as_it_is(chunk: object) -> object:
    return chunk


def _start_worker(number: int) -> None:  # noqa: ARG001 - the DataLoader's signature
    torch.set_num_threads(1)
    # When the training process is killed, its workers would wait for ever to hand over their work.
    with contextlib.suppress(OSError, AttributeError):  # no such call but on Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # Images come and go by the megabyte; memory given back and asked for again costs a page fault
    # for every 4 KiB, together as much as a resize.
    with contextlib.suppress(OSError, AttributeError):  # no such call but in glibc
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, _KEPT_BYTES)
    # A stop request goes to the whole process group; the training process needs its batches until
    # it has saved, and ends the workers itself.
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(request, signal.SIG_IGN)
