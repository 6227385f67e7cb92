"""Worker processes that prepare pieces of work in order, and die with the training process.

Pixels cross in memory that a worker fills and hands over by its descriptor: nothing is copied on
the way, and a full or small /dev/shm does not matter. A worker shares no lock and no pipe with
another, so that one which is killed, whatever it was doing, blocks nobody. It is replaced, and what
it had been given is prepared again: a piece of work is a pure function of its number.
"""

import contextlib
import logging
import mmap
import multiprocessing
import os
import queue
import resource
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.reduction import recv_handle, send_handle
from multiprocessing.util import Finalize
from typing import Final, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigsimclr.data.processes import die_with_parent, ending
from bigsimclr.errors import DataError

logger = logging.getLogger(__name__)

_OPEN_FILES: Final = 65_536
_TRIES: Final = 3  # deaths at one piece of work before it is given up
_MOST_DEATHS: Final = 10  # in a row, without one piece of work done


class Carried(Protocol):
    """A piece of work whose pixels cross apart from the rest."""

    @property
    def pixels(self) -> Tensor:
        """Return the pixels, of any shape and type."""
        ...

    def with_pixels(
        self,
        pixels: Tensor,  # [...] of any shape
    ) -> Self:
        """Return the same with other pixels."""
        ...


T = TypeVar("T", bound=Carried)


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
    _allow_open_files()
    team = _Team(reader, workers)
    window = max(ahead, 2 * workers)
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


class _Team(Generic[T]):
    def __init__(self, reader: Dataset[T], workers: int) -> None:
        self._reader = reader
        self._deaths: Counter[int] = Counter()
        self._in_a_row = 0
        self._workers: list[_Worker] = []
        # A generator that an error keeps alive is not closed before the process exits, which would
        # wait for ever for workers that ignore requests to stop.
        self.end = Finalize(None, _end, args=(self._workers,), exitpriority=1)
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
                received: tuple[int, T] = _received(worker.connection)
            except (EOFError, OSError):
                self._replace(worker)
                continue
            number, item = received
            ready[number] = item
            worker.given.remove(number)
            self._in_a_row = 0

    def _hand(self, worker: _Worker, number: int) -> None:
        worker.given.append(number)
        with contextlib.suppress(OSError):  # dead, as is noticed when it is listened to
            worker.connection.send(number)

    def _started(self) -> _Worker:
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
        fresh = self._started()
        self._workers[self._workers.index(worker)] = fresh
        for number in worker.given:
            self._hand(fresh, number)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.connection.close()
    for worker in workers:
        worker.process.join()


def _allow_open_files() -> None:
    # Every piece of work that waits in memory is an open file; the usual 1,024 end a big batch.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard or hard == resource.RLIM_INFINITY:
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _serve(reader: Dataset[Carried], training: Connection, connection: Connection) -> None:
    training.close()
    torch.set_num_threads(1)
    # When the training process is killed, its workers would wait for ever to hand over their work.
    die_with_parent()
    # A stop request goes to the whole process group; the training process needs its batches until
    # it has saved, and ends the workers itself.
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(request, signal.SIG_IGN)
    # A connection holds a few finished items only. The rest waits here, while work goes on.
    done: queue.SimpleQueue[tuple[int, Carried | _Unexpected]] = queue.SimpleQueue()
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


def _hand_over(
    connection: Connection, done: "queue.SimpleQueue[tuple[int, Carried | _Unexpected]]"
) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        while True:
            _send(connection, *done.get())


def _send(connection: Connection, number: int, item: "Carried | _Unexpected") -> None:
    if isinstance(item, _Unexpected):
        connection.send((number, item, (), torch.uint8, 0))
        return
    pixels = item.pixels.contiguous()
    rest = item.with_pixels(torch.empty(0))
    connection.send((number, rest, tuple(pixels.shape), pixels.dtype, pixels.nbytes))
    if not pixels.nbytes:
        return
    descriptor = os.memfd_create("bigsimclr-images")
    try:
        waiting = pixels.numpy().reshape(-1).view(np.uint8).data
        while waiting:
            waiting = waiting[os.write(descriptor, waiting) :]
        send_handle(connection, descriptor, None)
    finally:
        os.close(descriptor)


def _received(connection: Connection) -> tuple[int, T]:
    number, item, shape, dtype, size = connection.recv()
    if isinstance(item, _Unexpected):
        raise item.error
    if not size:
        return number, item.with_pixels(torch.empty(shape, dtype=dtype))
    try:
        descriptor = recv_handle(connection)
    except RuntimeError as error:  # it died between the two
        raise EOFError from error
    try:
        memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    # The tensor keeps the mapping, and the mapping the memory.
    return number, item.with_pixels(torch.frombuffer(memory, dtype=dtype).view(shape))
