"""How far a run is, on standard output: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as RichProgress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_BAR_SECONDS = 0.1  # between two drawings of the bar
_LINE_SECONDS = 5.0  # between two lines of a log file
_BAR_WIDTH = 18
_BAR_FROM = 100  # columns of a terminal; on a narrower one the figures need the bar's place
_CLOCK_WIDTH = 8  # of the remaining time, up to 99:59:59
_HIDDEN = 30.0 * 86400  # a remaining time beyond this is no estimate


class Progress:
    """Tell a person how far a run is; nothing here changes or delays the run.

    Args:
        console: where a bar is drawn; None writes plain lines.
        enabled: False says nothing at all.
    """

    def __init__(self, console: Console | None, *, enabled: bool) -> None:
        self._console = console
        self._enabled = enabled
        self._interval = _LINE_SECONDS if console is None else _BAR_SECONDS
        self._due = 0.0
        self._title = ""
        self._total = 0
        self._first = 0
        self._step = 0
        self._started = 0.0
        self._values: dict[str, float] = {}
        self._is_behind = False  # whether something measured has not been shown yet
        self._bar: RichProgress | None = None
        self._has_bar = False
        self._stop_bar: weakref.finalize[[], Progress] | None = None
        self._task = TaskID(0)

    def begin(self, title: str, total_steps: int, first_step: int, detail: str) -> None:
        """Announce a stage.

        Args:
            title: name of the stage.
            total_steps: updates of the whole stage.
            first_step: updates that are made already; more than 0 when a run continues.
            detail: what will be done, in a few words.
        """
        if not self._enabled:
            return
        self._close_bar()
        self._title, self._total = title, total_steps
        self._first = self._step = first_step
        self._started = time.monotonic()
        self._due = self._started + self._interval
        self._values, self._is_behind = {}, False
        again = f", continuing at {first_step:,}" if first_step else ""
        self.note(f"{title}: {total_steps:,} steps{again}; {detail}")
        if self._console is not None:
            self._open_bar(self._console)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take note of a step and of what was measured; shown when the next showing is due.

        Args:
            step: updates made.
            values: recorded names and values; the last value of each name is shown.
        """
        if not self._enabled:
            return
        self._step = step
        self._values.update(values)
        now = time.monotonic()
        self._is_behind = now < self._due
        if self._is_behind:
            return
        self._due = now + self._interval
        if self._bar is not None:
            shown = headline(self._values, room=self._room(self._bar.console.width))
            self._bar.update(self._task, completed=step, values=shown)
            self._bar.refresh()
        else:
            self._write(self._line(now))

    def end(self, summary: str) -> None:
        """Close a stage.

        Args:
            summary: its result in a few words.
        """
        if self._is_behind and self._bar is None:
            self._write(self._line(time.monotonic()))
        self._is_behind = False
        self._close_bar()
        self.note(summary)

    def note(self, text: str) -> None:
        """Say something between the steps.

        Args:
            text: one line.
        """
        if not self._enabled:
            return
        if self._console is not None:
            self._console.print(Text(_one_line(text)), soft_wrap=True)
        else:
            self._write(text)

    def _open_bar(self, console: Console) -> None:
        self._has_bar = console.width >= _BAR_FROM
        bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            *([BarColumn(bar_width=_BAR_WIDTH)] if self._has_bar else []),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # Should the values be too long even so, they are cut, never the counts.
            TextColumn(
                "{task.fields[values]}",
                markup=False,
                style="dim",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
            auto_refresh=False,  # no thread beside the training
            transient=True,
        )
        self._task = bar.add_task(
            _one_line(self._title), total=self._total, completed=self._first, values=""
        )
        bar.start()
        # A run that dies without `end` must not leave the terminal without its cursor.
        self._stop_bar = weakref.finalize(self, bar.stop)
        self._bar = bar

    def _room(self, width: int) -> int:
        """Return the columns that title, counts and clock leave for the values."""
        taken = len(self._title) + 2 * len(str(self._total)) + 1 + _CLOCK_WIDTH + 3
        return width - taken - (_BAR_WIDTH + 1 if self._has_bar else 0)

    def _close_bar(self) -> None:
        if self._stop_bar is not None:
            self._stop_bar()
        self._bar = self._stop_bar = None

    def _line(self, now: float) -> str:
        share = self._step / max(1, self._total)
        text = f"{self._title} {self._step:,}/{self._total:,} ({100 * share:.0f}%)"
        shown = headline(self._values)
        text += f"  {shown}" if shown else ""
        made = self._step - self._first
        left = (self._total - self._step) * (now - self._started) / made if made > 0 else _HIDDEN
        return f"{text}  {clock(left)} left" if 0 < left < _HIDDEN else text

    def _write(self, text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        line = _one_line(text).encode(encoding, errors="replace").decode(encoding)
        # A reader that went away (`| head`) must not end a training of days.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def show_progress(enabled: bool) -> Progress:  # noqa: FBT001 - the one thing it is asked
    """Return a progress display for standard output.

    Args:
        enabled: False gives a display that stays silent.
    """
    if not enabled or not sys.stdout.isatty():
        return Progress(None, enabled=enabled)
    console = Console(highlight=False)
    return Progress(None if console.is_dumb_terminal else console, enabled=True)


def headline(values: Mapping[str, float], *, room: int | None = None) -> str:
    """Put the recorded values that say most into a few words.

    Args:
        values: recorded names and values.
        room: characters there are; None for as many as it takes. With too few, the words get
            shorter first, then what says least is left out.
    """
    parts = _parts(values)
    text = "  ".join(part.full for part in parts)
    if room is None or len(text) <= room:
        return text
    while parts:
        short = [part.short for part in parts]
        for gap in ("  ", " "):
            text = gap.join(short)
            if len(text) <= room:
                return text
        parts.remove(max(parts, key=lambda part: part.leaves_first))
    return ""


@dataclass(frozen=True)
class _Part:
    """One measured value in words."""

    full: str
    short: str
    leaves_first: int  # where there is no room, the highest goes


def _parts(values: Mapping[str, float]) -> list[_Part]:
    parts: list[_Part] = []
    if "train/loss" in values:
        loss, chance = values["train/loss"], values.get("train/chance_loss")
        against = "" if chance is None else f" (chance {chance:.2f})"
        parts.append(_Part(f"loss {loss:.3f}{against}", f"loss {loss:.2f}", 0))
    shares = (
        ("pairs", "train/contrastive_accuracy", ".0%", 6),
        ("train", "train/accuracy", ".0%", 5),
        ("knn", "knn/accuracy", ".1%", 2),
        ("held out", "held_out/accuracy", ".1%", 1),
    )
    for name, key, digits, leaves_first in shares:
        if key in values:
            share = values[key]
            parts.append(
                _Part(f"{name} {share:.1%}", f"{name} {format(share, digits)}", leaves_first)
            )
    if "train/images_per_second" in values:
        speed = f"{values['train/images_per_second']:,.0f} img/s"
        parts.append(_Part(speed, speed, 3))
    if values.get("train/data_wait", 0.0) >= 0.005:
        wait = f"wait {values['train/data_wait']:.0%}"
        parts.append(_Part(wait, wait, 4))
    return parts


def clock(seconds: float) -> str:
    """Write a duration as 0:42, 12:05 or 3:20:00.

    Args:
        seconds: the duration.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _one_line(text: str) -> str:
    """Replace what could move the cursor or colour the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
