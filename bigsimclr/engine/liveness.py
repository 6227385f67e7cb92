"""A watch over the ranks of a run: one that is dead, hangs or is slow is named by the others.

A collective waits for a lost rank for as long as it is allowed to, and cannot be left. So a thread
of every rank tells the others through the store, which the launcher holds, that it lives and where
its training is, and ends the process when one of them does not.
"""

import faulthandler
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Protocol, Self

from bigsimclr.engine.stop import Interrupted
from bigsimclr.errors import DistributedError, Stopped

INTERVAL: Final = 0.2
"""Seconds between two looks; a look is two small requests to the store."""
LONGEST_LOOK: Final = 1.0
"""Seconds that count at most between two looks: a process that was itself stopped, or could not
run, has not seen how long the others were silent."""
STORE_SECONDS: Final = 2.0
"""Seconds in which a run may end by itself after the store is gone, at most `hang_seconds`."""
STACKS_SECONDS: Final = 0.6
"""Seconds to write stacks, and for the others to see the alarm; a dead disk must not hold us."""
START_ALLOWANCE: Final = 3.0
"""Times `hang_seconds` until every rank has come, and before its third update."""
START_SECONDS: Final = 120.0
"""Seconds until the first update, at least: imports and data do not know `hang_seconds`."""
WINDOW: Final = 50
"""Steps over which the ranks' times are compared."""
SLOW: Final = 1.5
"""Times the median over the ranks that a slow rank's median takes, at least."""
DONE: Final = "done"
PACKAGE: Final = Path(__file__).parents[1]
COLLECTIVES: Final = (
    str(PACKAGE / "world.py"),
    str(PACKAGE / "parallel") + os.sep,
    f"{os.sep}torch{os.sep}distributed{os.sep}",
)
"""Where the source lies of calls that wait for other ranks."""

logger = logging.getLogger(__name__)


class Board(Protocol):
    """What is used of a `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def add(self, key: str, value: int, /) -> int:
        """Count."""

    def check(self, keys: list[str], /) -> bool:
        """Say whether all keys are there."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Read; waits for keys that are not there."""


@dataclass(frozen=True)
class Beat:
    """What a rank publishes about itself."""

    host: str = ""
    pid: int = 0
    count: int = 0  # grows as long as the process can run
    progress: int = 0  # grows with every change of phase
    step: int = 0
    phase: str = "start"
    patience: float = START_SECONDS  # seconds that the phase may take
    waiting: bool = False  # whether it is inside a call that waits for other ranks
    steps: int = 0  # whose time was measured
    median: float = 0.0  # of the last steps' computing, seconds
    ended: str = ""  # "done", or the name of the error that ended it

    @property
    def place(self) -> str:
        """Say where the training is."""
        return f"step {self.step}, {self.phase}"


class Judge:
    """Find out which rank holds up the others, from what is seen of all beats over time.

    Args:
        size: number of ranks, W.
        hang_seconds: time without a sign of life, or without progress of any rank, that is too
            long.
    """

    def __init__(self, size: int, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._start_seconds = max(START_SECONDS, START_ALLOWANCE * hang_seconds)
        self._last: list[Beat | None] = [None] * size
        self._heard = [0.0] * size  # when its beat was last seen to change
        self._moved = 0.0  # when any rank was last seen to progress

    def verdict(
        self,
        beats: Sequence[Beat | None],  # of every rank; None: none yet
        now: float,  # seconds since the start
    ) -> str | None:
        """Name the rank to blame, or None while all is well."""
        for rank, (beat, last) in enumerate(zip(beats, self._last, strict=True)):
            if beat is not None and (last is None or beat.count != last.count):
                self._heard[rank] = now
                if last is None or beat.progress != last.progress:
                    self._moved = now
        self._last = list(beats)
        working = [rank for rank, beat in enumerate(beats) if beat is None or beat.ended != DONE]
        if len(working) < 2:  # the last one holds up nobody
            return None
        return self._silent(working, now) or self._stuck(working, now)

    def _silent(self, working: Sequence[int], now: float) -> str | None:
        for rank in working:
            beat, seconds = self._last[rank], now - self._heard[rank]
            if beat is None:
                if seconds >= self._start_seconds:
                    return f"rank {rank} has not started in {seconds:.1f} s"
            elif seconds >= self._hang_seconds:
                ended = f", and ended with {beat.ended}" if beat.ended else ""
                return (
                    f"{_name(rank, beat)} has shown no sign of life for {seconds:.1f} s; "
                    f"it was at {beat.place}{ended}"
                )
        return None

    def _stuck(self, working: Sequence[int], now: float) -> str | None:
        beats = {rank: beat for rank in working if (beat := self._last[rank]) is not None}
        seconds = now - self._moved
        patience = max(beat.patience for beat in beats.values())
        if len(beats) < len(working) or seconds < patience:
            return None
        # Who waits for others is not to blame; among equals, who does not wait.
        behind = min((beat.progress, beat.waiting) for beat in beats.values())
        guilty = [r for r, beat in beats.items() if (beat.progress, beat.waiting) == behind]
        others = [beat for rank, beat in beats.items() if rank not in guilty]
        place = beats[guilty[0]].place
        if not others:
            return f"no rank makes progress for {seconds:.1f} s; all are at {place}"
        named = " and ".join(_name(rank, beats[rank]) for rank in guilty)
        return (
            f"{named} makes no progress for {seconds:.1f} s at {place}, "
            f"while the others wait at {others[0].place}"
        )


class Pulse:
    """Tell the other ranks that this one lives and where it is, and watch them.

    Used as a context manager around the work that all ranks do together. When a rank is to blame,
    one line on standard error names it, every rank that can writes the stacks of its threads, and
    the process ends at once with exit code 6: its main thread is inside a call that never returns,
    so no exception could reach it.

    Every rank must enter as many as the others, and make the same calls of `at`.

    Args:
        store: where ranks leave messages; None does nothing.
        rank: number of this rank.
        size: number of ranks, W; 1 does nothing.
        hang_seconds: time without a sign of life or progress that is too long.
        stacks: folder for stacks; made when there are some.
    """

    def __init__(
        self, store: Board | None, rank: int, size: int, *, hang_seconds: float, stacks: Path
    ) -> None:
        self._store = store if size > 1 else None
        self._rank, self._size = rank, size
        self._hang_seconds = hang_seconds
        self._stacks = stacks
        patience = max(START_SECONDS, START_ALLOWANCE * hang_seconds)
        self._own = Beat(host=platform.node(), pid=os.getpid(), patience=patience)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._first: int | None = None  # the step that this process began with
        self._steps = 0
        self._compared = 0  # steps up to which the ranks' times were compared
        self._all_came = False  # whether every rank has published something
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def step(self) -> int:
        """Number of the update that `at` last told of."""
        return self._own.step

    def at(self, phase: str, step: int, *, allowance: float = 1.0) -> None:
        """Say what the training does now; costs nothing.

        Args:
            phase: what begins now, e.g. data.
            step: number of the update.
            allowance: times `hang_seconds` that it may take on all ranks; three at least before
                the third update, when kernels are chosen and caches are filled.
        """
        own = self._own
        if self._first is None:
            self._first = step
        if step < self._first + 2:
            allowance = max(allowance, START_ALLOWANCE)
        self._own = replace(
            own,
            phase=phase,
            step=step,
            patience=allowance * self._hang_seconds,
            progress=own.progress + 1,
        )

    def step_took(self, seconds: float) -> None:
        """Note the time that a step's computing took, without waiting for other ranks."""
        self._seconds.append(seconds)
        self._steps += 1

    def __enter__(self) -> Self:
        if self._store is not None:
            # A connection of its own: the main thread may hold the other one while it waits.
            clone: Callable[[], Board] | None = getattr(self._store, "clone", None)
            board = self._store if clone is None else clone()
            prefix = f"pulse/{board.add(f'pulse/count/{self._rank}', 1)}"
            self._publish(board, prefix, 0)  # before the others can wait for us
            self._thread = threading.Thread(
                target=self._watch, args=(board, prefix), name="pulse", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        well = kind is None or issubclass(kind, Stopped | Interrupted)
        self._own = replace(self._own, ended=DONE if well or kind is None else kind.__name__)
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(timeout=STORE_SECONDS)

    # --- the thread --------------------------------------------------------------------------

    def _watch(self, board: Board, prefix: str) -> None:
        judge = Judge(self._size, self._hang_seconds)
        awake = 0.0  # seconds
        looked = time.monotonic()
        for count in itertools.count(1):
            leaving = self._leaving.wait(INTERVAL)
            now = time.monotonic()
            awake += min(now - looked, LONGEST_LOOK)
            looked = now
            try:
                self._publish(board, prefix, count)
                if leaving:
                    return
                beats = self._read(board, prefix)
                alarmed = board.check([f"{prefix}/alarm"])
            except RuntimeError as error:
                # A broken connection stays broken. The run may end by itself in the meantime.
                if not self._leaving.wait(min(self._hang_seconds, STORE_SECONDS)):
                    what = str(error).partition("\n")[0]
                    self._end(
                        f"rank {self._rank} lost the process that held the ranks together, at "
                        f"{self._own.place} ({what}). Stacks: {self._stacks}"
                    )
                return
            if self._rank == 0:
                self._compare([beat for beat in beats if beat is not None])
            verdict = judge.verdict(beats, awake)
            if (verdict or alarmed) and not self._leaving.is_set():
                self._agree(board, prefix, verdict)

    def _read(self, board: Board, prefix: str) -> list[Beat | None]:
        keys = [f"{prefix}/{rank}" for rank in range(self._size)]
        if not self._all_came and not board.check(keys):
            there = [key for key in keys if board.check([key])]
        else:
            self._all_came, there = True, keys
        found = dict(zip(there, board.multi_get(there), strict=True))
        return [Beat(**json.loads(found[key])) if key in found else None for key in keys]

    def _publish(self, board: Board, prefix: str, count: int) -> None:
        seconds = list(self._seconds)
        beat = replace(
            self._own,
            count=count,
            waiting=_is_waiting(),
            steps=self._steps,
            median=statistics.median(seconds) if seconds else 0.0,
        )
        board.set(f"{prefix}/{self._rank}", json.dumps(asdict(beat)))

    def _compare(self, beats: Sequence[Beat]) -> None:
        if self._steps < self._compared + WINDOW or len(beats) < self._size:
            return
        if min(beat.steps for beat in beats) < WINDOW:
            return
        self._compared = self._steps
        # The low one: of two ranks, the slow one is compared with the other.
        usual = statistics.median_low(beat.median for beat in beats)
        for rank, beat in enumerate(beats):
            if beat.median >= SLOW * usual > 0:
                logger.warning(
                    "rank %d (%s) computes %.1fx slower than the median over %d steps",
                    rank,
                    beat.host,
                    beat.median / usual,
                    WINDOW,
                )

    def _agree(self, board: Board, prefix: str, verdict: str | None) -> NoReturn:
        """End with the others; the first to have a verdict speaks, so that all say the same."""
        first = False
        with suppress(RuntimeError):
            first = verdict is not None and board.add(f"{prefix}/voices", 1) == 1
            board.set(f"{prefix}/alarm", "1")
        where = f"Stacks of the ranks that answer: {self._stacks}"
        self._end(f"{verdict}. {where}" if first else None)

    def _end(self, message: str | None) -> NoReturn:
        # Nothing that may block for ever, such as a dead disk, can keep this thread.
        threading.Thread(target=self._leave_word, args=(message,), daemon=True).start()
        time.sleep(STACKS_SECONDS)
        os._exit(DistributedError.exit_code)

    def _leave_word(self, message: str | None) -> None:
        if message is not None:
            # Not through sys.stderr, whose lock the main thread may hold.
            os.write(2, f"bigsimclr: error: {message}\n".encode())
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            path = self._stacks / f"rank-{self._rank}.txt"
            with path.open("w", encoding="utf-8") as file:
                print(f"rank {self._rank} at {self._own.place}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} (host {beat.host}, pid {beat.pid})"


def _is_waiting() -> bool:
    """Say whether any other thread of this process is inside a call that waits for other ranks."""
    return any(
        place in frame.f_code.co_filename
        for thread, frame in sys._current_frames().items()  # noqa: SLF001 - documented
        if thread != threading.get_ident()
        for place in COLLECTIVES
    )
