"""Let everything happen to jobs that a Slurm cluster does to them, and compare their weights.

    python -m benchmarks.storm_slurm --events 40 -o benchmarks/results/storm_slurm.json

A real Slurm of three nodes is started on this machine. A pretraining recipe is submitted on two of
them with `bigsimclr submit`. While it trains, one event after the other strikes: the warning
signal, the time limit, preemption by a higher partition, `scontrol requeue`, the loss of a node
(its daemon and its step are killed; its rank too, or it lives on), a controller that is killed and
comes back, `scancel`. Each run must go on by itself where it was, or after scancel by the same
`submit` only, until it is finished; its last checkpoint must be, bit for bit, that of a run nobody
disturbed.
"""

import argparse
import getpass
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, get_args

from benchmarks.machine import machine
from benchmarks.slurm_lab import Lab, lab, missing
from benchmarks.storm_ranks import GLOBAL_BATCH, RECIPE, SAVE_EVERY, same_state, verify
from bigsimclr.engine.checkpoint import published
from bigsimclr.launch.jobs import jobs_of
from bigsimclr.report.attempts import read_attempts
from bigsimclr.report.records import read_records
from bigsimclr.stages.run_directory import environment

Event = Literal[
    "warning", "time limit", "preemption", "requeue", "node lost", "controller lost", "scancel"
]
GRACEFUL: Final = ("warning", "time limit", "preemption", "requeue", "scancel")
"""Events that leave a run the time to save."""
PROFILE: Final = """\
nodes: 2
time: 02:00:00
partition: low
signal_seconds: 58
"""
PATIENCE: Final = 240.0  # seconds that anything may take
DEAD_SECONDS: Final = 15.0  # that a cancelled job is watched for


@dataclass
class Findings:
    """What a storm did and what it found."""

    events: dict[str, int] = field(default_factory=dict)
    runs: int = 0  # finished ones
    state_bitwise_equal: int = 0  # runs
    runs_lost: list[str] = field(default_factory=list)
    steps_lost: dict[str, list[int]] = field(default_factory=dict)  # of each event
    restarts: int = 0
    restarts_expected: int = 0
    resurrected: int = 0  # cancelled jobs that came back
    left_behind: int = 0  # ranks that lived on where Slurm had lost their node
    double_writers: int = 0
    checkpoints_verified: int = 0
    checkpoints_damaged: list[str] = field(default_factory=list)
    checkpoints_gone: int = 0

    @property
    def good(self) -> bool:
        """Say whether all promises were kept."""
        graceful = [n for kind in GRACEFUL for n in self.steps_lost.get(kind, [])]
        lost = [n for found in self.steps_lost.values() for n in found]
        return (
            self.state_bitwise_equal == self.runs > 0
            and not self.runs_lost
            and max(graceful, default=0) == 0
            # A save is published by the next one at the latest.
            and max(lost, default=0) <= 2 * SAVE_EVERY
            and self.restarts == self.restarts_expected
            and self.resurrected == self.double_writers == self.checkpoints_gone == 0
            and not self.checkpoints_damaged
        )


class Storm:
    """Runs of one recipe, one after the other, until all events have struck.

    Args:
        cluster: where they run.
        directory: for recipe, profile and runs.
        steps: updates of each run.
        chooser: chooses the instants.
    """

    def __init__(self, cluster: Lab, directory: Path, steps: int, chooser: random.Random) -> None:
        self.findings = Findings()
        self._lab, self._directory, self._chooser = cluster, directory, chooser
        recipe = RECIPE.format(steps=steps, batch=GLOBAL_BATCH, every=SAVE_EVERY)
        (directory / "storm.yaml").write_text(recipe)
        (directory / "profile.yaml").write_text(PROFILE)
        self._quiet = directory / "quiet"
        job = self._submit(self._quiet)
        self._await(lambda: bool(read_records(self._quiet)), "the quiet run to train")
        began = time.monotonic()
        self._await(lambda: self._state(job) == "COMPLETED", "the quiet run to finish")
        self._train_seconds = time.monotonic() - began

    def strike(self, events: list[Event]) -> Findings:
        """Let all events happen, the last one first."""
        waiting = list(events)
        while waiting:
            run = self._directory / f"run-{self.findings.runs}"
            self.findings.runs += 1
            try:
                self._suffer(run, waiting)
            except TimeoutError as error:
                self.findings.runs_lost.append(f"{run.name}: {error}")
                print(_logs(run), file=sys.stderr, flush=True)
                self._lab.slurm("scancel", "--user", getpass.getuser())
                if len(self.findings.runs_lost) > 2:
                    break
            else:
                self.findings.state_bitwise_equal += same_state(run, self._quiet)
                self.findings.double_writers += self._was_written_by_others(run)
            shutil.rmtree(run, ignore_errors=True)
        return self.findings

    def _suffer(self, run: Path, waiting: list[Event]) -> None:
        """Submit a run, and let events happen to it until it is finished."""
        job = self._submit(run)
        restarts = 0  # that this job should have
        while waiting:
            attempts = len(read_attempts(run))
            if not self._instant_comes(run, job):
                break
            event = waiting.pop()
            print(f"{time.strftime('%X')} {run.name}: {event}", file=sys.stderr, flush=True)
            before = published(run / "checkpoints")
            back = self._strike(event, job)
            verify(before, published(run / "checkpoints"), self.findings)
            if back is None:
                waiting.insert(0, event)
                break
            self.findings.events[event] = self.findings.events.get(event, 0) + 1
            if event == "controller lost":
                continue
            if event == "scancel":
                self._count_restarts(job, restarts)
                job, restarts = self._submit(run), 0
            else:
                restarts += 1
            self._await(
                lambda known=attempts: len(read_attempts(run)) > known,  # type: ignore[misc]
                f"job {job} to train again after {event}",
            )
            newest = read_attempts(run)[-1]
            lost = (newest.reached or 0) - newest.first_step
            self.findings.steps_lost.setdefault(event, []).append(max(0, lost))
            back()
        self._await(lambda: self._state(job) == "COMPLETED", f"job {job} to finish")
        self._count_restarts(job, restarts)

    def _instant_comes(self, run: Path, job: str) -> bool:
        """Wait for a random instant of the training; say whether the run still goes on then."""
        known = read_records(run)[-1].step if read_records(run) else 0

        def trains() -> bool:
            records = read_records(run)
            return bool(records) and records[-1].step > known

        def is_over() -> bool:
            return (run / "result.json").exists()

        self._await(lambda: trains() or is_over(), f"job {job} to train")
        end = time.monotonic() + self._chooser.uniform(0.02, 0.15) * self._train_seconds
        self._await(lambda: time.monotonic() > end or is_over(), "the instant")
        return not is_over()

    def _strike(self, event: Event, job: str) -> Callable[[], None] | None:
        """Let one event happen, and wait until the job begins again.

        Returns:
            What puts the cluster in order afterwards; None where the run was finished first.
        """
        slurm = self._lab.slurm
        back: Callable[[], None] = _nothing
        before = int(self._lab.job(job)["Restarts"])
        match event:
            case "warning":
                slurm("scancel", "--signal=USR2", job)
            case "time limit":
                slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
            case "preemption":
                words = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null"]
                slurm("sbatch", *words, "--wrap=sleep 1")
            case "requeue":
                slurm("scontrol", "requeue", job)
            case "node lost":
                back = self._lose_node(job)
            case "controller lost":
                self._lab.kill_controller()
                time.sleep(self._chooser.uniform(1, 6))
                self._lab.start_controller()
                return back
            case "scancel":
                slurm("scancel", job)
                self._await(lambda: self._state(job) == "CANCELLED", "the job to be cancelled")
                time.sleep(DEAD_SECONDS)
                self.findings.resurrected += self._state(job) != "CANCELLED"
                return back
        if not self._begins_again(job, before, event):
            back()
            return None
        return back

    def _begins_again(self, job: str, restarts: int, event: Event) -> bool:
        """Wait until a job begins again, and say whether it does: it may have been finished."""

        def is_decided() -> bool:
            facts = self._lab.job(job)
            return int(facts["Restarts"]) > restarts or facts["JobState"] == "COMPLETED"

        self._await(is_decided, f"restart after {event}")
        if int(self._lab.job(job)["Restarts"]) == restarts:
            return False
        if event == "time limit":
            self._lab.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=120")
        self._await(lambda: self._state(job) == "RUNNING", f"job {job} to begin after {event}")
        return True

    def _lose_node(self, job: str) -> Callable[[], None]:
        facts = self._lab.job(job)
        listed = self._lab.slurm("scontrol", "show", "hostnames", facts["NodeList"]).split()
        node = self._chooser.choice(listed)
        left = self._lab.kill_node(node, ranks_too=self._chooser.random() < 0.5)
        self.findings.left_behind += len(left)
        return lambda: self._lab.start_node(node)

    def _count_restarts(self, job: str, expected: int) -> None:
        self.findings.restarts += int(self._lab.job(job)["Restarts"])
        self.findings.restarts_expected += expected

    def _was_written_by_others(self, run: Path) -> bool:
        """Say whether two starts of a job wrote the same run, or one goes on beside it."""
        steps = [record.step for record in read_records(run)]
        attempts = read_attempts(run)
        newest = [path.name for path in published(run / "checkpoints")]
        time.sleep(2.0)
        left = [pid for number in (1, 2, 3) for pid in self._lab.processes(f"node{number}")]
        signs = {
            "records out of order": any(b < a for a, b in pairwise(steps)),
            "attempts that overlap": any(b.began < (a.ended or 0.0) for a, b in pairwise(attempts)),
            "checkpoints after the end": newest != [p.name for p in published(run / "checkpoints")],
            f"processes {left}": bool(left),
        }
        found = [sign for sign, is_there in signs.items() if is_there]
        if found:
            print(f"{run.name}: {', '.join(found)}", file=sys.stderr, flush=True)
        return bool(found)

    def _submit(self, run: Path) -> str:
        words = ["submit", str(self._directory / "storm.yaml"), "--out", str(run)]
        words += ["--on", str(self._directory / "profile.yaml")]
        subprocess.run(  # noqa: S603 - made here
            [sys.executable, "-m", "bigsimclr", *words],
            env=self._lab.environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return jobs_of(run)[-1].number

    def _state(self, job: str) -> str:
        return self._lab.job(job)["JobState"]

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(subprocess.SubprocessError):
                if condition():
                    return
            time.sleep(0.1)
        raise TimeoutError(f"waited {PATIENCE:g} s for {what}")


def _nothing() -> None:
    """Put nothing in order."""


def _logs(run: Path) -> str:
    logs = {Path(job.log) for job in jobs_of(run)}
    return "\n".join(log.read_text(errors="replace")[-6000:] for log in logs if log.exists())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=40, help="of all kinds in turn")
    parser.add_argument("--kinds", nargs="+", choices=get_args(Event), default=get_args(Event))
    parser.add_argument("--steps", type=int, default=1200, help="updates of each run")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instants")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    why = missing()
    if why is not None:
        parser.exit(1, f"{why}\n")
    started, where = time.monotonic(), machine()
    chooser = random.Random(options.seed)  # noqa: S311 - instants, not secrets
    events: list[Event] = [options.kinds[n % len(options.kinds)] for n in range(options.events)]
    chooser.shuffle(events)
    with tempfile.TemporaryDirectory() as folder, lab(Path(folder) / "slurm", nodes=3) as cluster:
        version = cluster.slurm("sinfo", "--version").strip()
        runs = Path(folder) / "runs"
        runs.mkdir()
        findings = Storm(cluster, runs, options.steps, chooser).strike(events)
    result = {
        "command": " ".join(["python", "-m", "benchmarks.storm_slurm", *sys.argv[1:]]),
        "environment": {**environment(), **where, "slurm": version},
        "seconds": round(time.monotonic() - started, 1),
        "good": findings.good,
        **asdict(findings),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="", flush=True)
    if options.output is not None:
        options.output.write_text(text)
    sys.exit(0 if findings.good else 1)


if __name__ == "__main__":
    main()
