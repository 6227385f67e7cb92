"""Work on many images in processes of this machine, without torch; a process that dies is named.

Each process has a pipe of its own and shares no lock, so that one that is killed, whatever it was
doing, can neither block the others nor be waited for in vain.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Final, Generic, TypeVar

from bigsimclr.errors import DataError

T = TypeVar("T")

_PIECE: Final = 32  # numbers handed to a process at a time
_TRIES: Final = 2  # times that a process may die at a number before the number is to blame
_MOST_DEATHS: Final = 100  # of processes that were at no number
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG
_NOWHERE: Final = 2**63 - 1


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def die_with_parent() -> None:
    """End this process when its parent is killed, which it would otherwise not notice."""
    with contextlib.suppress(OSError, AttributeError):  # no such call but on Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    # It may have been killed before that call.
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def ending(code: int | None) -> str:
    """Say how a process ended, by its exit code as `multiprocessing` gives it."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


def in_processes(
    work: Callable[[int], T],  # a pure function of the number
    count: int,
    *,
    workers: int,
    on_death: Callable[[int, str], T],
) -> Iterator[tuple[int, T]]:
    """Yield (number, work(number)) for 0 to `count` - 1, each once, as they get ready.

    Where a process dies it is replaced. A number at which two processes died is not tried again:
    `on_death(number, reason)` stands for its result.

    Args:
        work: what to do; its exceptions are raised here.
        count: how many numbers there are.
        workers: processes; 0 works in this one.
        on_death: makes the result of a number that kills whoever works on it.

    Raises:
        DataError: processes die without having worked.
    """
    if not workers:
        yield from ((number, work(number)) for number in range(count))
        return
    pool = _Pool(work, min(workers, max(1, -(-count // _PIECE))), on_death)
    try:
        yield from pool.run(count)
    finally:
        pool.end()


@dataclass
class _Process:
    process: ForkProcess
    connection: Connection
    place: mmap.mmap  # the number it works on, eight bytes shared with it
    numbers: list[int]  # handed to it and not answered

    @property
    def number(self) -> int:
        return int.from_bytes(self.place[:8], "little")


class _Pool(Generic[T]):
    def __init__(
        self, work: Callable[[int], T], workers: int, on_death: Callable[[int, str], T]
    ) -> None:
        self._work = work
        self._on_death = on_death
        self._deaths: Counter[int] = Counter()
        self._waiting: deque[list[int]] = deque()
        self._processes: list[_Process] = []
        for _ in range(workers):
            self._processes.append(self._start())

    def run(self, count: int) -> Iterator[tuple[int, T]]:
        cursor = 0
        while True:
            for one in self._processes:
                if one.numbers:
                    continue
                if self._waiting:
                    one.numbers = self._waiting.popleft()
                elif cursor < count:
                    one.numbers = list(range(cursor, min(cursor + _PIECE, count)))
                    cursor += len(one.numbers)
                else:
                    continue
                with contextlib.suppress(OSError):  # dead: its silence is heard below
                    one.connection.send(one.numbers)
            busy = {one.connection: one for one in self._processes if one.numbers}
            if not busy:
                return
            for ready in wait(list(busy)):
                yield from self._answer(busy[ready])  # type: ignore[index] # what was waited for

    def end(self) -> None:
        for one in self._processes:
            one.connection.close()
            one.process.kill()
        for one in self._processes:
            one.process.join()

    def _start(self) -> _Process:
        place = mmap.mmap(-1, 8)
        place[:8] = _NOWHERE.to_bytes(8, "little")
        here, there = multiprocessing.Pipe()
        # A fork shares the source's memory with all and starts in milliseconds.
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(self._work, here, there, place), daemon=True
        )
        process.start()
        # With the only other end in the process, its death ends the connection.
        there.close()
        return _Process(process, here, place, [])

    def _answer(self, one: _Process) -> Iterator[tuple[int, T]]:
        try:
            results = one.connection.recv()
        except (EOFError, OSError):
            yield from self._bury(one)
            return
        if isinstance(results, Exception):
            raise results
        numbers, one.numbers = one.numbers, []
        yield from zip(numbers, results, strict=True)

    def _bury(self, one: _Process) -> Iterator[tuple[int, T]]:
        """Replace a process that died, and blame the number it died at when it is the second."""
        one.connection.close()
        one.process.join()
        number, rest = one.number, one.numbers
        self._deaths[number] += 1
        reason = ending(one.process.exitcode)
        if number == _NOWHERE and self._deaths[number] > _MOST_DEATHS:
            raise DataError(
                f"processes that read images die again and again, last {reason}: is there too"
                " little memory?"
            )
        self._processes[self._processes.index(one)] = self._start()
        if number in rest and self._deaths[number] >= _TRIES:
            rest = [other for other in rest if other != number]
            yield number, self._on_death(number, f"ended {_TRIES} processes that read it, {reason}")
        if rest:
            self._waiting.appendleft(rest)


def _serve(
    work: Callable[[int], object], parent: Connection, connection: Connection, place: mmap.mmap
) -> None:
    die_with_parent()
    parent.close()
    # An interrupt goes to the whole process group; who started the work ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # nobody wants the answers any more
        while True:
            numbers = connection.recv()
            try:
                results: object = [_noted(work, number, place) for number in numbers]
            except Exception as error:  # noqa: BLE001 - told in the process that asked
                results = error
            place[:8] = _NOWHERE.to_bytes(8, "little")
            connection.send(results)


def _noted(work: Callable[[int], object], number: int, place: mmap.mmap) -> object:
    place[:8] = number.to_bytes(8, "little")
    return work(number)
