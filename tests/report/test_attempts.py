"""Attempts: one line when one begins and one when it ends, readable whatever else is there."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigsimclr.report.attempts import FILE_NAME, Attempt, note_began, note_ended, read_attempts


def begin(run_dir: Path, step: int, **changes: object) -> None:
    facts = {"world_size": 2, "job": "12_3", "restart": 1, "reached": None, "alive": None}
    note_began(run_dir, step=step, **{**facts, **changes})  # type: ignore[arg-type]


def test_lines_are_these(tmp_path: Path) -> None:
    before = time.time()
    begin(tmp_path, 40, reached=44, alive=7.5)
    note_ended(tmp_path, step=60, why="SIGUSR2")
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    times = [line.pop("time") for line in lines]
    assert before <= times[0] <= times[1] <= time.time()
    assert lines == [
        {
            "event": "began",
            "step": 40,
            "world_size": 2,
            "job": "12_3",
            "restart": 1,
            "reached": 44,
            "alive": 7.5,
        },
        {"event": "ended", "step": 60, "why": "SIGUSR2"},
    ]
    assert read_attempts(tmp_path) == [
        Attempt(times[0], 40, 2, "12_3", 1, 44, 7.5, times[1], 60, "SIGUSR2")
    ]


def test_a_killed_attempt_has_no_end(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    begin(tmp_path, 0, job=None, restart=0)
    begin(tmp_path, 8)
    note_ended(tmp_path, step=20, why="done")
    first, second = read_attempts(tmp_path)
    assert (first.first_step, first.ended, first.last_step, first.why) == (0, None, None, None)
    assert (first.job, first.restart) == (None, 0)
    assert (second.first_step, second.last_step, second.why) == (8, 20, "done")


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"event": "beg',
        b"\xff\xfe\x00",
        b"[1, 2]\n3\nnull\n\n",
        b"[" * 100_000,
        b'{"event": "paused", "time": 1.0, "step": 3}\n',
        b'{"event": "began", "time": "x", "step": 3, "world_size": 1}\n',
        b'{"event": "began", "time": 1.0, "step": -3, "world_size": 1}\n',
        b'{"event": "began", "time": 1.0, "step": true, "world_size": 1}\n',
        b'{"event": "began", "time": NaN, "step": 3, "world_size": 1}\n',
        b'{"event": "began", "time": 1e999, "step": 3, "world_size": 1}\n',
        b'{"event": "began", "time": 1.0, "step": ' + b"9" * 4000 + b', "world_size": 1}\n',
        b'{"event": "ended", "time": 1.0, "step": 3}\n',
        b'{"event": "ended", "time": 1.0, "step": 3, "why": 7}\n',
    ],
)
def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path, foreign: bytes) -> None:
    begin(tmp_path, 0)
    with (tmp_path / FILE_NAME).open("ab") as stream:
        stream.write(foreign)
    assert [attempt.first_step for attempt in read_attempts(tmp_path)] == [0]
    note_ended(tmp_path, step=5, why="SIGTERM")
    begin(tmp_path, 5)
    found = [(attempt.first_step, attempt.last_step) for attempt in read_attempts(tmp_path)]
    assert found == [(0, 5), (5, None)]


def test_an_end_without_a_beginning_is_passed_over(tmp_path: Path) -> None:
    note_ended(tmp_path, step=5, why="done")
    assert read_attempts(tmp_path) == []
    begin(tmp_path, 5)
    note_ended(tmp_path, step=9, why="done")
    note_ended(tmp_path, step=7, why="SIGTERM")
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.last_step, attempt.why) == (9, "done")


@pytest.mark.parametrize("full", ["half", "short", "sync", "open"])
def test_a_full_disk_costs_the_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: str
) -> None:
    begin(tmp_path, 0)
    before = (tmp_path / FILE_NAME).read_bytes()
    original = os.write

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_then_fail(descriptor: int, content: bytes) -> int:
        original(descriptor, content[: len(content) // 2])
        return fail()

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        match full:
            case "half":
                patch.setattr(os, "write", half_then_fail)
            case "short":
                patch.setattr(os, "write", lambda file, content: original(file, content[:5]))
            case "sync":
                patch.setattr(os, "fsync", fail)
            case _:
                patch.setattr(os, "open", fail)
        note_ended(tmp_path, step=5, why="done")
    assert f"cannot write {tmp_path / FILE_NAME}" in caplog.text
    assert (tmp_path / FILE_NAME).read_bytes() == before
    note_ended(tmp_path, step=6, why="done")
    assert [attempt.last_step for attempt in read_attempts(tmp_path)] == [6]


def test_a_login_node_reads_attempts_without_torch(tmp_path: Path) -> None:
    begin(tmp_path, 3)
    code = (
        "import sys; from pathlib import Path; from bigsimclr.report.attempts import read_attempts;"
        "print(read_attempts(Path(sys.argv[1]))[0].first_step);"
        "sys.exit(sorted({'torch', 'numpy', 'jinja2'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout == "3\n"
