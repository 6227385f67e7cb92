import io
import sys

import pytest
from rich.console import Console

from bigsimclr.report import progress
from bigsimclr.report.progress import Progress, clock, headline, show_progress

VALUES = {
    "train/loss": 3.7612,
    "train/chance_loss": 12.469,
    "train/contrastive_accuracy": 0.314,
    "train/images_per_second": 2412.4,
    "train/data_wait": 0.012,
}


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def test_lines_come_every_five_seconds_and_at_both_ends(turned, capsys):
    shown = show_progress(True)
    shown.begin("pretrain", 1000, 0, "1,437 images")
    for step in range(1, 1001):
        turned.now += 1 / 64
        shown.update(step, VALUES if step % 10 == 0 else {})
    shown.end("pretrain: done")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pretrain: 1,000 steps; 1,437 images"
    assert lines[1] == (
        "pretrain 320/1,000 (32%)  loss 3.761 (chance 12.47)  pairs 31.4%  2,412 img/s  wait 1%"
        "  0:11 left"
    )
    assert lines[-2].startswith("pretrain 1,000/1,000 (100%)  loss 3.761")
    assert "left" not in lines[-2]
    assert lines[-1] == "pretrain: done"
    assert len(lines) == 6


def test_a_continued_run_estimates_from_its_own_steps(turned, capsys):
    shown = show_progress(True)
    shown.begin("pretrain", 1000, 900, "x")
    turned.now += 6
    shown.update(950, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "pretrain: 1,000 steps, continuing at 900; x",
        "pretrain 950/1,000 (95%)  0:06 left",
    ]


def test_disabled_says_nothing(capsys):
    shown = show_progress(False)
    shown.begin("a", 3, 0, "x")
    shown.update(3, VALUES)
    shown.note("n")
    shown.end("e")
    assert capsys.readouterr() == ("", "")


def test_text_cannot_steer_the_terminal_or_break_lines(capsys):
    show_progress(True).note("a\x1b[31mred\r\nb\u202e")
    assert capsys.readouterr().out == "a [31mred  b \n"


def test_an_ascii_log_file_is_enough(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    show_progress(True).note("86.0% ± 2.0")
    stream.seek(0)
    assert stream.read() == "86.0% ? 2.0\n"


def test_a_reader_that_went_away_stops_nothing(monkeypatch):
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    show_progress(True).note("x")


def test_bar_shows_counts_values_and_gives_the_cursor_back(turned):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    shown = Progress(console, enabled=True)
    shown.begin("pretrain", 100, 0, "[bold]kept[/bold]")
    for step in range(1, 101):
        turned.now += 0.05
        shown.update(step, VALUES)
    shown.end("pretrain: [red]done[/red]")
    drawn = stream.getvalue()
    assert "[bold]kept[/bold]" in drawn
    assert "50/100" in drawn
    assert "loss 3.761 (chance 12.47)" in drawn
    assert drawn.rstrip().endswith("pretrain: [red]done[/red]")
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1


ALL_VALUES = {
    **VALUES,
    "knn/accuracy": 0.95,
    "train/data_wait": 0.04,
}


@pytest.mark.parametrize("width", [60, 72, 80, 99, 100, 120, 200])
def test_nothing_is_cut_off_at_any_width(width, turned):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    shown = Progress(console, enabled=True)
    shown.begin("pretrain", 1123, 0, "x")
    turned.now += 1
    shown.update(562, ALL_VALUES)
    drawn = stream.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in drawn
    assert "562/1123" in drawn
    assert "loss 3.76" in drawn
    if width >= 80:
        for part in ("pairs 31", "knn 95.0%", "2,412 img/s", "wait 4%"):
            assert part in drawn
    assert ("\N{BOX DRAWINGS HEAVY HORIZONTAL}" in drawn) == (width >= 100)
    shown.end("done")


def test_headline_says_less_where_there_is_less_room():
    whole = headline(ALL_VALUES)
    assert headline(ALL_VALUES, room=len(whole)) == whole
    assert headline(ALL_VALUES, room=52) == "loss 3.76 pairs 31% knn 95.0% 2,412 img/s wait 4%"
    assert headline(ALL_VALUES, room=33) == "loss 3.76  knn 95.0%  2,412 img/s"
    assert headline(ALL_VALUES, room=20) == "loss 3.76  knn 95.0%"
    assert headline(ALL_VALUES, room=9) == "loss 3.76"
    assert headline(ALL_VALUES, room=3) == headline(ALL_VALUES, room=-9) == ""


def test_a_bar_that_is_dropped_gives_the_cursor_back(turned):
    stream = io.StringIO()
    shown = Progress(Console(file=stream, force_terminal=True, width=80), enabled=True)
    shown.begin("a", 5, 0, "x")
    del shown
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_headline_takes_what_is_there():
    assert headline({}) == ""
    assert headline({"train/loss": 0.5, "held_out/accuracy": 0.975}) == "loss 0.500  held out 97.5%"
    assert headline({"train/data_wait": 0.001, "train/images_per_second": 10}) == "10 img/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (12_000, "3:20:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
