"""How far a run is, on standard output: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
import weakref
from collections.abc import Mapping

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
            self._bar.update(self._task, completed=step, values=headline(self._values))
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
        bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # On a narrow terminal the values are cut, never the counts.
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


def headline(values: Mapping[str, float]) -> str:
    """Put the recorded values that say most into a few words.

    Args:
        values: recorded names and values.
    """
    parts: list[str] = []
    if "train/loss" in values:
        chance = values.get("train/chance_loss")
        against = "" if chance is None else f" (chance {chance:.2f})"
        parts.append(f"loss {values['train/loss']:.3f}{against}")
    shares = {
        "pairs": "train/contrastive_accuracy",
        "train": "train/accuracy",
        "knn": "knn/accuracy",
        "held out": "held_out/accuracy",
    }
    parts += [f"{name} {values[key]:.1%}" for name, key in shares.items() if key in values]
    if "train/images_per_second" in values:
        parts.append(f"{values['train/images_per_second']:,.0f} img/s")
    if values.get("train/data_wait", 0.0) >= 0.005:
        parts.append(f"wait {values['train/data_wait']:.0%}")
    return "  ".join(parts)


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
