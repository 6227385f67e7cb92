"""Requests to stop: signals become a flag that the training loop reads between two updates."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self, TypeAlias

from bigsimclr.world import World

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Gravest first. SIGTERM: preemption. SIGINT: Ctrl-C. SIGUSR2: an early warning, as Slurm sends
it."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """A stop was asked for in the middle of work that can be done again."""


class StopRequest:
    """Note the gravest signal that asks to stop; a second Ctrl-C ends the process at once.

    Used as a context manager, which puts the earlier handlers back. The handlers do nothing but
    set a flag: saving inside a handler could meet a half-finished update, or a half-finished save.
    Outside the main thread Python allows no handlers; there nothing is installed.
    """

    def __init__(self) -> None:
        # A set, since a handler may run between any two steps of what is done here.
        self._received: set[int] = set()
        self._interrupted = False
        self._previous: dict[signal.Signals, _Handler] = {}

    @property
    def received(self) -> str | None:
        """Name of the gravest signal that has come, e.g. "SIGTERM"."""
        return next((found.name for found in STOP_SIGNALS if found in self._received), None)

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
        """Return the gravest signal that came to any rank, and note all: ranks stop together."""
        masks = world.numbers(sum(1 << s for s in STOP_SIGNALS if s in self._received))
        agreed = [s for s in STOP_SIGNALS if any(mask >> s & 1 for mask in masks)]
        self._received.update(agreed)
        # Not what has come here since, of which the others do not know.
        return agreed[0].name if agreed else None

    def check(self, world: World) -> None:
        """Leave work that can be done again, if a signal has come to any rank.

        Raises:
            Interrupted: a signal has come; every rank leaves.
        """
        if self.agree(world) is not None:
            raise Interrupted

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received.add(number)
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
