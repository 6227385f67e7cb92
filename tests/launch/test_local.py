"""Ranks on this machine end together, with the right exit code and the right words."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from bigsimclr.launch.local import is_rank, run_command
from tests.launch.jobs import job, seconds_until_gone

LIMIT = 5.0  # seconds from the first death to the last
MANY = 100_000  # steps: until something happens


def test_ranks_know_each_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
    program = f"""
import os
words = " ".join(os.environ[name] for name in {names})
open(os.path.join({str(tmp_path)!r}, os.environ["RANK"]), "w").write(words)
print(words)
"""
    assert run_command(2, [sys.executable, "-c", program]) == 0
    assert (tmp_path / "0").read_text() == "0 0 2 2 7"
    assert (tmp_path / "1").read_text() == "1 1 2 2 7"
    assert capfd.readouterr().out == "0 0 2 2 7\n"  # rank 0 alone speaks
    assert not is_rank()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_rank()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 75, 75], 75),
        ([0, 6, 3], 3),  # who ends with 6 has only noticed
        ([6, 0, 0], 6),
        ([130, 0, 75], 130),
    ],
)
def test_exit_code_is_that_of_the_cause(codes: list[int], expected: int) -> None:
    program = f"import os; os._exit({codes}[int(os.environ['RANK'])])"
    assert run_command(3, [sys.executable, "-c", program]) == expected


def test_a_rank_that_ends_well_leaves_the_others_their_time() -> None:
    # Longer than the others get after a failure.
    program = "import os, time; time.sleep(3 * (os.environ['RANK'] == '0'))"
    assert run_command(2, [sys.executable, "-c", program]) == 0


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    with job(tmp_path, 3, MANY) as running:
        pids = running.pids()
        os.kill(pids[2], signal.SIGKILL)
        assert seconds_until_gone(pids, time.monotonic()) < LIMIT
        code, _, err = running.end()
    assert code == 6
    (line,) = [line for line in err.splitlines() if "was lost" in line]
    assert re.fullmatch(
        rf"rank 2 \(pid {pids[2]}\) was lost \(SIGKILL\); the other ranks were ended after "
        r"\d\.\d s\. The same command continues from the last checkpoint\.",
        line,
    )


@pytest.mark.slow
def test_ranks_that_notice_nothing_are_killed(tmp_path: Path) -> None:
    with job(tmp_path, 3, MANY, "sleep-0", hang_seconds=60) as running:
        pids = running.pids()
        time.sleep(0.5)  # now rank 0 sleeps, and does not hear of it
        os.kill(pids[1], signal.SIGKILL)
        assert 2 <= seconds_until_gone(pids, time.monotonic()) < LIMIT
        code, _, err = running.end()
    assert code == 6
    assert f"rank 1 (pid {pids[1]}) was lost (SIGKILL)" in err


@pytest.mark.slow
def test_a_failing_rank_gives_its_exit_code(tmp_path: Path) -> None:
    with job(tmp_path, 3, MANY, "exit3-1") as running:
        pids = running.pids()
        code, _, err = running.end()
    assert code == 3
    assert "an image is missing" in err
    assert "was lost" not in err
    assert seconds_until_gone(pids, time.monotonic()) < 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    with job(tmp_path, 2, MANY) as running:
        running.pids()
        running.launcher.send_signal(number)
        code, _, err = running.end()
    assert code == 75
    assert err.splitlines() == ["on request"] * 2


@pytest.mark.slow
def test_a_terminals_ctrl_c_counts_once(tmp_path: Path) -> None:
    with job(tmp_path, 2, MANY) as running:
        running.pids()
        os.killpg(running.launcher.pid, signal.SIGINT)
        code, _, err = running.end()
    assert code == 75
    assert err.splitlines() == ["on request"] * 2


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with job(tmp_path, 2, MANY, "sleep-0", hang_seconds=60) as running:
        pids = running.pids()
        time.sleep(0.5)
        for _ in range(2):
            running.launcher.send_signal(signal.SIGINT)
            time.sleep(0.3)  # a collective of rank 1 hides it from both
        assert seconds_until_gone(pids, time.monotonic()) < LIMIT
        code, _, _ = running.end()
    assert code != 0


@pytest.mark.slow
def test_ranks_do_not_outlive_the_launcher(tmp_path: Path) -> None:
    with job(tmp_path, 2, MANY, hang_seconds=2) as running:
        pids = running.pids()
        running.launcher.kill()
        assert seconds_until_gone(pids, time.monotonic()) < 2 + 1.5
        _, _, err = running.end()
    assert "lost the process that held the ranks together" in err
