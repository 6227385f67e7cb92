"""Jobs on a real Slurm of three nodes on this machine, as a user submits them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.slurm_lab import Lab, lab, missing
from benchmarks.storm_ranks import GLOBAL_BATCH, RECIPE, same_state
from benchmarks.storm_slurm import Storm
from bigsimclr.engine.checkpoint import published
from bigsimclr.launch.jobs import jobs_of
from bigsimclr.report.attempts import read_attempts
from bigsimclr.report.records import read_records
from tests.end_to_end.test_pipeline import SHORT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

PATIENCE = 180.0  # seconds
PROFILE = "{nodes: 2, time: 01:00:00, signal_seconds: 10}\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("cluster") / "slurm", nodes=3, gpus=2) as made:
        yield made


class User:
    """A person in a folder on a login node."""

    def __init__(self, cluster: Lab, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "two.yaml").write_text(PROFILE)

    def recipe(self, steps: int) -> str:
        file = self.folder / "tiny.yaml"
        file.write_text(RECIPE.format(steps=steps, batch=GLOBAL_BATCH, every=2))
        return str(file)

    def says(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bigsimclr", *words],
            cwd=self.folder,
            env={**self.cluster.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def submits(self, *words: str, on: str = "two.yaml") -> None:
        done = self.says("submit", *words, "--on", on)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    def job(self, run: str) -> str:
        return jobs_of(self.folder / run)[-1].number

    def state(self, run: str) -> str:
        return self.cluster.job(self.job(run))["JobState"]

    def log(self, run: str) -> str:
        log = Path(jobs_of(self.folder / run)[-1].log)
        return log.read_text() if log.exists() else ""

    def waits_for(self, run: str, state: str = "COMPLETED") -> None:
        self.waits(lambda: self.state(run) == state, run)

    def waits(self, condition: Callable[[], bool], run: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(subprocess.SubprocessError):
                if condition():
                    return
            time.sleep(0.1)
        raise AssertionError(f"{self.state(run)}\n{self.log(run)}")

    def ranks(self) -> dict[int, int]:
        """Find the ranks of the one job that runs: rank -> process."""
        found = {}
        for pid in (pid for number in (1, 2, 3) for pid in self.cluster.processes(f"node{number}")):
            with suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if b"bigsimclr.launch.task" in Path(f"/proc/{pid}/cmdline").read_bytes().split(
                    b"\0"
                ):
                    words = dict(word.split(b"=", 1) for word in environ if b"=" in word)
                    found[int(words[b"SLURM_PROCID"])] = pid
        return found

    def waits_for_training(self, run: str, beyond: int = 0) -> None:
        def trains() -> bool:
            records = read_records(self.folder / run)
            return bool(records) and records[-1].step > beyond

        self.waits(trains, run)


@pytest.fixture
def user(cluster: Lab, tmp_path: Path) -> Iterator[User]:
    yield User(cluster, tmp_path)
    cluster.slurm("scancel", "--user", "root")


def test_the_digits_pipeline_equals_the_local_one(user: User) -> None:
    user.submits("digits", *SHORT, "--out", "far")
    local = user.says("run", "digits", *SHORT, "--out", "near", "--ranks", "2", "-q")
    assert local.returncode == 0, local.stderr
    steps = [job.step for job in jobs_of(user.folder / "far")]
    assert steps == ["pretrain", "knn", "linear", "supervised", "finetune", "distill"]
    user.waits_for("far")
    for job in jobs_of(user.folder / "far"):
        assert user.cluster.job(job.number)["JobState"] == "COMPLETED", Path(job.log).read_text()
    near, far = user.folder / "near", user.folder / "far"
    runs = [path.parent.relative_to(near) for path in near.rglob("result.json")]
    trained = [run for run in runs if (near / run / "checkpoints").exists()]
    assert len(runs) == 48
    assert len(trained) == 47
    assert all(same_state(far / run, near / run) for run in trained)
    accuracy = [
        json.loads((run / "knn" / "result.json").read_text())["metrics"] for run in (near, far)
    ]
    assert accuracy[0] == accuracy[1]
    assert (far / "report.html").exists()
    again = user.says("submit", "digits", *SHORT, "--out", "far", "--on", "two.yaml")
    assert (again.returncode, again.stdout) == (0, "far: finished already\n")


def test_events(cluster: Lab, tmp_path: Path) -> None:
    storm = Storm(cluster, tmp_path, 200, random.Random(0))
    found = storm.strike(["scancel", "node lost", "warning", "preemption"])
    assert found.good, found
    assert sum(found.events.values()) == 4


def test_a_signal_to_one_rank_stops_all(user: User) -> None:
    user.submits(user.recipe(120), "--out", "quiet")
    user.waits_for("quiet")
    user.submits(user.recipe(120), "--out", "run")
    user.waits_for_training("run")
    os.kill(user.ranks()[1], signal.SIGTERM)  # somebody's wish: not requeued
    user.waits_for("run", "FAILED")
    assert "stopped: by SIGTERM at step" in user.log("run")
    assert user.cluster.job(user.job("run"))["Restarts"] == "0"
    user.submits(user.recipe(120), "--out", "run")
    user.waits_for_training("run", read_records(user.folder / "run")[-1].step)
    os.kill(user.ranks()[1], signal.SIGUSR2)  # the warning: requeued
    user.waits_for("run")
    assert user.cluster.job(user.job("run"))["Restarts"] == "1"
    assert [attempt.why for attempt in read_attempts(user.folder / "run")] == [
        "SIGTERM",
        "SIGUSR2",
        "done",
    ]
    assert same_state(user.folder / "run", user.folder / "quiet")


def test_the_batch_script_hands_on_what_it_alone_hears(user: User) -> None:
    user.submits(user.recipe(2000), "--out", "run")
    user.waits_for_training("run")
    user.cluster.slurm("scancel", "--batch", "--signal=USR2", user.job("run"))
    user.waits(lambda: user.cluster.job(user.job("run"))["Restarts"] == "1", "run")
    attempt = read_attempts(user.folder / "run")[0]
    assert (attempt.why, attempt.restart) == ("SIGUSR2", 0)
    newest = published(user.folder / "run" / "checkpoints")[0]
    assert int(newest.name) == attempt.last_step * GLOBAL_BATCH  # type: ignore[operator]


def test_a_job_that_makes_no_progress_is_given_up(user: User) -> None:
    recipe = user.recipe(100_000)
    user.submits(
        recipe,
        "checkpoint.every_steps=50000",
        "--out",
        "run",
        "--set",
        "restarts_without_progress=1",
    )
    for restart in range(2):
        user.waits(
            lambda known=restart: len(read_attempts(user.folder / "run")) > known,  # type: ignore[misc]
            "run",
        )
        os.kill(user.ranks()[1], signal.SIGKILL)
        time.sleep(1.0)
    user.waits_for("run", "FAILED")
    assert user.cluster.job(user.job("run"))["Restarts"] == "1"
    assert "was restarted 1 times without progress; not requeued" in user.log("run")
    assert "failed (exit " in user.says("runs", ".").stdout


@pytest.mark.parametrize("launcher", [pytest.param("srun", marks=pytest.mark.long), "torchrun"])
def test_several_ranks_of_a_node(user: User, launcher: str) -> None:
    four = (
        "--set",
        "ranks_per_node=2",
        "--set",
        "gpus_per_node=2",
        "--set",
        f"launcher={launcher}",
    )
    user.submits(user.recipe(80), "--out", "run", *four)
    user.waits_for_training("run")
    user.cluster.slurm("scancel", "--signal=USR2", user.job("run"))
    user.waits_for("run")
    assert [attempt.why for attempt in read_attempts(user.folder / "run")] == ["SIGUSR2", "done"]
    assert user.cluster.job(user.job("run"))["Restarts"] == "1"
    local = user.says("run", user.recipe(80), "--out", "near", "--ranks", "4", "-q")
    assert local.returncode == 0, local.stderr
    assert same_state(user.folder / "run", user.folder / "near")


def test_a_sweep_and_what_comes_after_it(user: User) -> None:
    user.submits(user.recipe(9), "--out", "sweep", "--array", "optimizer.learning_rate=0.1,0.2")
    user.submits(user.recipe(8), "--out", "last", "--after", "sweep/learning_rate=0.1")
    user.waits_for("last")
    for rate in ("0.1", "0.2"):
        run = f"sweep/learning_rate={rate}"
        user.waits_for(run)
        assert f"learning_rate: {rate}" in (user.folder / run / "recipe.yaml").read_text()
    first, second = (user.job(f"sweep/learning_rate={rate}") for rate in ("0.1", "0.2"))
    assert (first.partition("_")[2], second.partition("_")[2]) == ("0", "1")
    lines = json.loads(user.says("runs", ".", "--json").stdout)["runs"]
    found = {line["run"]: (line["state"], line["done"], line["total"]) for line in lines}
    assert found == {
        "last": ("finished", 8, 8),
        "sweep/learning_rate=0.1": ("finished", 9, 9),
        "sweep/learning_rate=0.2": ("finished", 9, 9),
    }
    log = user.says("logs", "-f", "last")
    assert log.returncode == 0
    assert "pretrain: done" in log.stdout


def test_a_cancelled_run_stays_cancelled(user: User) -> None:
    user.submits(user.recipe(100_000), "--out", "run")
    user.waits_for_training("run")
    again = user.says("submit", user.recipe(100_000), "--out", "run", "--on", "two.yaml")
    assert again.returncode == 2
    assert f"job {user.job('run')} works on it (RUNNING)" in again.stderr
    assert len(again.stderr.splitlines()) == 1
    assert user.says("cancel", "run").stdout == f"run: cancelled {user.job('run')}\n"
    user.waits_for("run", "CANCELLED")
    user.waits(lambda: not user.ranks(), "run")
    assert user.says("cancel", "run").stdout == "run: no job waits or runs\n"
    attempt = read_attempts(user.folder / "run")[-1]
    newest = published(user.folder / "run" / "checkpoints")[0]
    assert attempt.why == "SIGTERM"
    assert int(newest.name) == attempt.last_step * GLOBAL_BATCH  # type: ignore[operator]


def test_a_batch_script_of_ones_own(user: User) -> None:
    script = user.folder / "own.sbatch"
    command = f"{sys.executable} -m bigsimclr srun {user.recipe(2000)} --out {user.folder}/run"
    script.write_text(f"#!/bin/bash\nexec {command}\n")
    words = ["--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append"]
    log = user.folder / "own.log"
    said = user.cluster.slurm("sbatch", *words, f"--output={log}", str(script))
    job = said.split()[-1]
    user_run = user.folder / "run"
    end = time.monotonic() + PATIENCE
    while not read_records(user_run) and time.monotonic() < end:
        time.sleep(0.1)
    user.cluster.slurm("scancel", "--signal=USR2", job)
    while len(read_attempts(user_run)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    first, second = read_attempts(user_run)
    assert (first.why, first.job, second.restart) == ("SIGUSR2", job, 1)
    assert second.first_step == first.last_step
    assert f"job {job} is requeued" in log.read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["--set", "partition=mian"],
            2,
            "partition: the cluster has no partition 'mian'; did you mean 'main'?",
        ),
        (
            ["--set", "time='2-00:00:00'"],
            2,
            "time: 2-00:00:00 is more than partition 'main' gives (1-00:00:00)",
        ),
        (["--set", "ranks_per_node=5"], 2, "multiple of 10 ranks"),
        (["--set", "nodes=4"], 2, "nodes: 4 are more than partition 'main' gives (3)"),
        (
            ["--set", "constraint=fast"],
            2,
            "Slurm refuses the job: Batch job submission failed: Invalid feature specification",
        ),
        (["--after", "nothing"], 2, "--after nothing: no job works on it, and it is not finished"),
    ],
)
def test_what_the_cluster_cannot_do_is_one_line(
    user: User, words: list[str], code: int, said: str
) -> None:
    done = user.says("submit", user.recipe(8), "--out", "run", "--on", "two.yaml", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    left = [path.name for path in (user.folder / "run").rglob("*") if path.is_file()]
    assert set(left) <= {"profile.json", "recipe.yaml"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PATH": "/nowhere"}, "Slurm's scontrol is not here"),
        ({"SLURM_CONF": "/nowhere/slurm.conf"}, "Slurm "),
    ],
)
def test_without_slurm_it_is_one_line(user: User, variables: dict[str, str], said: str) -> None:
    words = ["submit", user.recipe(8), "--out", "run", "--on", "two.yaml"]
    done = user.says(*words, **variables)
    assert (done.returncode, done.stdout) == (6, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_munge_it_is_one_line(tmp_path: Path) -> None:
    with lab(tmp_path / "slurm", nodes=1) as own:
        user = User(own, tmp_path)
        own.stop_munge()
        done = user.says("submit", user.recipe(8), "--out", "run", "--on", "two.yaml")
        assert (done.returncode, done.stdout) == (6, "")
        assert len(done.stderr.splitlines()) == 1
        assert "munge" in done.stderr.lower()
        own.start_munge()


def test_doctor_looks_at_the_cluster(user: User) -> None:
    done = user.says("doctor", "--slurm", "--on", "two.yaml")
    assert done.returncode == 0, done.stderr
    for line in (
        "partition    low: up, 3 nodes, at most 1-00:00:00, preemption requeue, 12 s of grace",
        "preemption   partition_prio, requeue; a run gets SIGTERM, and saves",
        "kill wait    8 sec between SIGTERM and the end: short for a checkpoint of a large network",
        "cpu binding  task/none: cpu_binding has no effect here",
        "profile      two.yaml fits: 2 ranks; asked to save 10 s before 1 h are over",
    ):
        assert line in done.stdout
    (user.folder / "two.yaml").write_text("{nodes: 9, time: 01:00:00}\n")
    unfit = user.says("doctor", "--slurm", "--on", "two.yaml")
    assert unfit.returncode == 2
    assert "two.yaml:1: nodes: 9 are more than partition 'main' gives (3)" in unfit.stdout
