"""Worker processes that prepare pieces of work in order, and die with the training process.

A worker shares no lock and no pipe with another, so that one which is killed, whatever it was
doing, blocks nobody. It is replaced, and what it had been given is prepared again: a piece of work
is a pure function of its number. Pixels do not go through the pipes; `slots.Slots` knows their
place by the piece's number, and nobody else writes there before the piece was used.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import queue
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.util import Finalize
from typing import Final, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from bigsimclr.data.processes import die_with_parent, ending
from bigsimclr.errors import DataError

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD: Final = -1  # M_TRIM_THRESHOLD
_MMAP_THRESHOLD: Final = -3  # M_MMAP_THRESHOLD
_KEPT_BYTES: Final = 256 << 20
_OWN_BYTES: Final = 32 << 20  # the most that every glibc takes
_TRIES: Final = 3  # deaths at one piece of work before it is given up
_MOST_DEATHS: Final = 10  # in a row, without one piece of work done
# A worker that another thread starts meanwhile would inherit the far end of the pipe, and hold it
# open when the worker whose it is has died.
_STARTING: Final = threading.Lock()

T = TypeVar("T")


def under_way(*, workers: int, ahead: int) -> int:
    """Count the pieces that may be in preparation or waiting, with the one that is used."""
    return max(ahead, 2 * workers)


def from_workers(
    reader: Dataset[T], count: int, *, workers: int, ahead: int
) -> Generator[T, None, None]:
    """Yield the items of a data set in order, prepared by worker processes.

    Closing the generator ends the workers.

    Args:
        reader: the items, by number from 0; each a pure function of its number.
        count: how many there are.
        workers: processes, at least 1.
        ahead: items prepared ahead, by all workers together.

    Raises:
        DataError: worker processes die again and again.
    """
    team = _Team(reader, workers)
    window = under_way(workers=workers, ahead=ahead)
    ready: dict[int, T] = {}
    given = 0
    try:
        for number in range(count):
            while given < min(count, number + window):
                team.give(given)
                given += 1
            while number not in ready:
                team.collect(ready)
            yield ready.pop(number)
    finally:
        team.end()


@dataclass(frozen=True)
class _Unexpected:
    """What a worker met in place of an item, to be raised in the training process."""

    error: RuntimeError


@dataclass
class _Worker:
    process: ForkProcess
    connection: Connection
    given: list[int] = field(default_factory=list)  # and not returned, in this order


@dataclass
class _Ending:
    """Keeps a thread that reads ahead from replacing workers while the process ends them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    has_begun: bool = False


class _Team(Generic[T]):
    def __init__(self, reader: Dataset[T], workers: int) -> None:
        self._reader = reader
        self._deaths: Counter[int] = Counter()
        self._in_a_row = 0
        self._workers: list[_Worker] = []
        # A generator that an error keeps alive is not closed before the process exits, which would
        # wait for ever for workers that ignore requests to stop.
        self._ending = _Ending()
        self.end = Finalize(None, _end, args=(self._workers, self._ending), exitpriority=1)
        for _ in range(workers):
            self._workers.append(self._started())

    def give(self, number: int) -> None:
        """Hand a number to whoever has least to do."""
        self._hand(min(self._workers, key=lambda worker: len(worker.given)), number)

    def collect(self, ready: dict[int, T]) -> None:
        """Wait until something comes, and take it."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]  # type: ignore[index] # what was waited for
            try:
                received: tuple[int, T | _Unexpected] = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            number, item = received
            if isinstance(item, _Unexpected):
                raise item.error
            ready[number] = item
            worker.given.remove(number)
            self._in_a_row = 0

    def _hand(self, worker: _Worker, number: int) -> None:
        worker.given.append(number)
        with contextlib.suppress(OSError):  # dead, as is noticed when it is listened to
            worker.connection.send(number)

    def _started(self) -> _Worker:
        with _STARTING:
            here, there = multiprocessing.Pipe()
            # A fork shares the source's memory with all workers and starts in milliseconds.
            process = multiprocessing.get_context("fork").Process(
                target=_serve, args=(self._reader, here, there), daemon=True
            )
            process.start()
            # With the only other end in the worker, its death ends the connection.
            there.close()
        return _Worker(process, here)

    def _replace(self, worker: _Worker) -> None:
        """Put a new worker in the place of a dead one, and give it the same work.

        Raises:
            DataError: that was tried often enough.
        """
        worker.process.join()
        worker.connection.close()
        self._in_a_row += 1
        # What it had finished was received before the end of its connection.
        self._deaths.update(worker.given[:1])
        how = ending(worker.process.exitcode)
        often = max((self._deaths[number] for number in worker.given[:1]), default=0)
        if often >= _TRIES or self._in_a_row >= _MOST_DEATHS:
            raise DataError(
                f"a process that reads images died {max(often, self._in_a_row)} times, last {how}."
                " Usual causes: too little memory, or an image that crashes its decoder (bigsimclr"
                " data scan finds it); lower input.workers or input.prefetch_batches"
            )
        logger.warning("a process that reads images died %s and was replaced", how)
        with self._ending.lock:
            if self._ending.has_begun:
                raise DataError("the reading of images was ended")
            fresh = self._started()
            self._workers[self._workers.index(worker)] = fresh
        for number in worker.given:
            self._hand(fresh, number)


def _end(workers: list[_Worker], ending: _Ending) -> None:
    with ending.lock:
        ending.has_begun = True
        for worker in workers:
            worker.process.kill()
            worker.connection.close()
    for worker in workers:
        worker.process.join()


def _serve(reader: Dataset[T], training: Connection, connection: Connection) -> None:
    training.close()
    torch.set_num_threads(1)
    # When the training process is killed, its workers would wait for ever to hand over their work.
    die_with_parent()
    _keep_memory()
    # A stop request goes to the whole process group; the training process needs its batches until
    # it has saved, and ends the workers itself.
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(request, signal.SIG_IGN)
    # A connection holds a few finished items only. The rest waits here, while work goes on.
    done: queue.SimpleQueue[tuple[int, T | _Unexpected]] = queue.SimpleQueue()
    threading.Thread(target=_hand_over, args=(connection, done), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # nobody asks any more
        while True:
            number = connection.recv()
            try:
                done.put((number, reader[number]))
            except Exception as error:  # noqa: BLE001 - raised in the training process
                told = RuntimeError(f"{type(error).__name__} while reading images: {error}")
                told.add_note(traceback.format_exc())
                done.put((number, _Unexpected(told)))


def _keep_memory() -> None:
    # Images come and go by the megabyte; memory given back and asked for again costs a page fault
    # for every 4 KiB, together as much as a resize.
    with contextlib.suppress(OSError, AttributeError):  # no such call but in glibc
        options = ctypes.CDLL(None).mallopt
        options(_MMAP_THRESHOLD, _OWN_BYTES)
        options(_TRIM_THRESHOLD, _KEPT_BYTES)


def _hand_over(
    connection: Connection, done: "queue.SimpleQueue[tuple[int, T | _Unexpected]]"
) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        while True:
            connection.send(done.get())
