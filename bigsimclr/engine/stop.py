"""Requests to stop: signals become a flag that the training loop reads between two updates."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self, TypeAlias

from bigsimclr.world import World

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""SIGTERM: preemption. SIGUSR2: an early warning, as Slurm sends it. SIGINT: Ctrl-C."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """A stop was asked for in the middle of work that can be done again."""


class StopRequest:
    """Note the first signal that asks to stop; a second Ctrl-C ends the process at once.

    Used as a context manager, which puts the earlier handlers back. The handlers do nothing but
    set a flag: saving inside a handler could meet a half-finished update, or a half-finished save.
    Outside the main thread Python allows no handlers; there nothing is installed.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the first signal, e.g. "SIGTERM"
        self._interrupted = False
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: the earlier handler was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def agree(self, world: World) -> str | None:
        """Return the signal that came to any rank, and note it: all of them stop together."""
        own = 0 if self.received is None else signal.Signals[self.received].value
        first = next((number for number in world.numbers(own) if number), None)
        if first is not None and self.received is None:
            self.received = signal.Signals(first).name
        return None if first is None else signal.Signals(first).name

    def check(self, world: World) -> None:
        """Leave work that can be done again, if a signal has come to any rank.

        Raises:
            Interrupted: a signal has come; every rank leaves.
        """
        if self.agree(world) is not None:
            raise Interrupted

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.received = self.received or name
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
