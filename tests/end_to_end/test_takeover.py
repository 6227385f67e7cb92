"""A machine that Slurm has lost sight of lives on; the job's next start takes the run over."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bigsimclr.engine.checkpoint import newest_checkpoint
from bigsimclr.engine.lock import hold_run
from bigsimclr.errors import StorageError
from bigsimclr.report.attempts import read_attempts
from bigsimclr.report.records import read_records
from bigsimclr.world import Job
from tests.stages import tiny

SECONDS = 100
STEPS = 80


class Start:
    """One start of the job: the command line and all processes that it makes."""

    def __init__(self, folder: Path, run: Path, restart: int, ranks: int) -> None:
        inherited = {n: v for n, v in os.environ.items() if not n.startswith("SLURM_")}
        recipe = folder / "recipe.yaml"
        words = ["run", str(recipe), "--out", str(run), "--quiet", "--ranks", str(ranks)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bigsimclr", *words],
            env=inherited | {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restart)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self._process.poll() is None, self._process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        for process in _family(self._process.pid):
            os.kill(process, number)

    def end(self) -> tuple[int, str]:
        _, words = self._process.communicate(timeout=SECONDS)
        return self._process.returncode, words

    def kill(self) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.communicate()


def _family(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(member for child in children for member in _family(int(child)))]


def contents(run: Path) -> dict[str, bytes]:
    """Return all files but those of unfinished saves, which nobody reads."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and "/.tmp-" not in path.as_posix()
    }


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    return {f"{s}/{n}": t for s, named in found.tensors.items() for n, t in named.items()}


def last_step(run: Path) -> int:
    return max((record.step for record in read_records(run)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_next_start_takes_over_and_the_lost_one_publishes_nothing(
    tmp_path: Path, ranks: int
) -> None:
    keys = ("log.every_steps=1", "checkpoint.every_steps=15", f"schedule.steps={STEPS}")
    recipe = tiny.recipe_of(tiny.PRETRAIN, *keys, "probe.knn_every_epochs=null")
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    run = tmp_path / "run"
    lost = Start(tmp_path, run, 0, ranks)
    later = None
    try:
        lost.wait_until(lambda: last_step(run) >= 20)
        lost.signal(signal.SIGSTOP)
        reached = last_step(run)
        assert reached < STEPS
        for job in (None, Job("78", 5), Job("77", 0)):
            refused = pytest.raises(StorageError, match=r"in use by process .* \(Slurm job 77\)")
            with refused, hold_run(run, job=job):
                pass

        later = Start(tmp_path, run, 1, ranks)
        later.wait_until(lambda: len(read_attempts(run)) == 2 and last_step(run) > reached)
        later.signal(signal.SIGSTOP)
        before = contents(run)
        assert "result.json" not in before
        lost.signal(signal.SIGCONT)
        code, words = lost.end()
        assert code == 7, words
        assert words.count("was taken over by another process while this one ran") == 1
        assert contents(run) == before

        later.signal(signal.SIGCONT)
        code, words = later.end()
        assert code == 0, words
        assert re.search(r"is taken over from process \d+ on .* \(Slurm job 77\)", words)
    finally:
        lost.kill()
        if later is not None:
            later.kill()

    first, second = read_attempts(run)
    assert (first.job, first.restart, first.world_size, first.ended) == ("77", 0, ranks, None)
    assert (second.job, second.restart, second.why) == ("77", 1, "done")
    assert second.last_step == STEPS
    assert second.reached is not None
    goodput = json.loads((run / "report.json").read_text())["lineage"][0]["goodput"]
    assert goodput["steps_kept"] == STEPS
    assert goodput["steps_computed"] == STEPS + max(0, second.reached - second.first_step)
    assert goodput["restarts"] == 1
    assert ", 1 restart, " in (run / "report.html").read_text()

    whole = Start(tmp_path, tmp_path / "whole", 0, ranks)
    assert whole.end() == (0, "")
    expected, found = tensors(tmp_path / "whole"), tensors(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
