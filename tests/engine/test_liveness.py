"""The rank that holds up the others is named, in time, and no other."""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bigsimclr.engine.liveness import Beat, Judge, Pulse
from tests.launch.jobs import job, seconds_until_gone

MANY = 100_000  # steps: until something happens
HANG = 10.0  # seconds, of the judge
FINE = Beat(host="h", pid=7, count=1, progress=5, step=3, phase="forward", patience=HANG)


def later(beat: Beat, count: int) -> Beat:
    return replace(beat, count=count)


def test_all_who_beat_and_progress_are_left_alone() -> None:
    judge = Judge(2, HANG)
    for now in range(100):
        assert judge.verdict([replace(FINE, count=now, progress=now)] * 2, now) is None


def test_a_rank_without_beats_is_named() -> None:
    judge = Judge(3, HANG)
    verdicts = [
        judge.verdict([replace(FINE, count=now, progress=now), replace(FINE, pid=9), FINE], now)
        for now in range(12)
    ]
    assert verdicts[:10] == [None] * 10
    assert verdicts[10] == (
        "rank 1 (host h, pid 9) has shown no sign of life for 10.0 s; it was at step 3, forward"
    )


def test_the_rank_that_is_behind_is_named() -> None:
    judge = Judge(3, HANG)
    behind = replace(FINE, progress=4, phase="data")
    for now in range(10):
        beats = [later(FINE, now), later(behind, now), later(FINE, now)]
        assert judge.verdict(beats, now) is None
    assert judge.verdict([later(beat, 10) for beat in beats], 10) == (
        "rank 1 (host h, pid 7) makes no progress for 10.0 s at step 3, data, "
        "while the others wait at step 3, forward"
    )


def test_among_equals_the_one_that_does_not_wait_is_named() -> None:
    judge = Judge(3, HANG)
    waits = replace(FINE, waiting=True)
    found = [
        judge.verdict([later(beat, now) for beat in (waits, waits, FINE)], now) for now in (0, 10)
    ]
    assert found[0] is None
    assert found[1] is not None
    assert found[1].startswith("rank 2 (host h, pid 7) makes no progress for 10.0 s")


def test_none_is_named_where_all_are_alike() -> None:
    judge = Judge(2, HANG)
    found = [judge.verdict([later(FINE, now)] * 2, now) for now in (0, 10)]
    assert found == [None, "no rank makes progress for 10.0 s; all are at step 3, forward"]


def test_a_phase_may_take_longer() -> None:
    judge = Judge(2, HANG)
    saves = replace(FINE, phase="save", patience=30.0)
    for now in range(30):
        assert judge.verdict([later(FINE, now), later(saves, now)], now) is None
    assert judge.verdict([later(FINE, 30), later(saves, 30)], 30) is not None


def test_who_is_done_holds_up_nobody() -> None:
    judge = Judge(3, HANG)
    done = replace(FINE, ended="done")
    for now in range(100):
        moving = replace(FINE, count=now, progress=now)
        assert judge.verdict([moving, done, moving], now) is None
        assert Judge(2, HANG).verdict([later(FINE, now), done], now) is None


def test_an_error_that_ended_a_rank_is_told() -> None:
    judge = Judge(2, HANG)
    failed = replace(FINE, ended="DataError")
    found = [judge.verdict([later(FINE, now), failed], now) for now in (0, 10)]
    assert found[1] is not None
    assert found[1].endswith("it was at step 3, forward, and ended with DataError")


def test_a_rank_that_never_came_is_named_later() -> None:
    judge = Judge(2, HANG)
    assert judge.verdict([later(FINE, 1), None], 119.0) is None
    assert judge.verdict([later(FINE, 2), None], 120.0) == "rank 1 has not started in 120.0 s"


def test_the_first_two_updates_may_take_longer(tmp_path: Path) -> None:
    pulse = Pulse(None, 0, 1, hang_seconds=0.1, stacks=tmp_path / "stacks")
    patience = [pulse._own.patience]
    for step in (5, 6, 7):
        pulse.at("data", step)
        patience.append(pulse._own.patience)
    assert patience == pytest.approx([120, 0.3, 0.3, 0.1])


def test_one_process_has_no_watch(tmp_path: Path) -> None:
    before = threading.active_count()
    with Pulse(None, 0, 1, hang_seconds=0.1, stacks=tmp_path / "stacks") as pulse:
        pulse.at("data", 0)
        pulse.step_took(0.1)
        assert threading.active_count() == before
    assert not (tmp_path / "stacks").exists()


@pytest.mark.slow
def test_a_stopped_rank_is_named_in_time(tmp_path: Path) -> None:
    with job(tmp_path, 3, MANY) as running:
        pids = running.pids()
        os.kill(pids[1], signal.SIGSTOP)
        noticed = seconds_until_gone([pids[0], pids[2]], time.monotonic())
        code, _, err = running.end()
    assert 2 <= noticed < 2 + 1.5
    assert code == 6
    (line,) = err.splitlines()
    assert re.search(rf"rank 1 \(host \S+, pid {pids[1]}\) has shown no sign of life for 2\.", line)
    assert sorted(file.name for file in (tmp_path / "stacks").iterdir()) == [
        "rank-0.txt",
        "rank-2.txt",
    ]
    assert "in gather" in (tmp_path / "stacks" / "rank-0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "place"), [("sleep-2", "step 7, data"), ("sleep-forward-2", "step 7, forward")]
)
def test_a_hanging_rank_is_named(tmp_path: Path, trouble: str, place: str) -> None:
    with job(tmp_path, 3, MANY, trouble) as running:
        pids = running.pids()
        code, _, err = running.end()
    assert code == 6
    (line,) = err.splitlines()
    assert re.search(
        rf"rank 2 \(host \S+, pid {pids[2]}\) makes no progress for 2\.\d s at {place}, "
        "while the others wait at step 7, forward",
        line,
    )
    assert "in _step" in (tmp_path / "stacks" / "rank-2.txt").read_text()


@pytest.mark.slow
def test_a_slow_rank_is_named_and_a_good_run_is_not_disturbed(tmp_path: Path) -> None:
    with job(tmp_path, 3, 130, "slow-2", "slower-1", hang_seconds=1.0) as running:
        code, out, err = running.end()
    assert (code, out) == (0, "rank 0 done\n")
    assert err
    for line in err.splitlines():
        assert re.fullmatch(
            r"rank 2 \(\S+\) computes [23]\.\dx slower than the median over 50 steps", line
        )
