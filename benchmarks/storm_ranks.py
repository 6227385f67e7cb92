"""Kill and stop single ranks of a pretraining run, and compare what it becomes with a quiet one.

    python -m benchmarks.storm_ranks --kills 20 --stops 7 -o benchmarks/results/storm_ranks.json

For each number of ranks, SIGKILL strikes one random rank: a third of the blows at any instant from
the start of the processes on, a third while training, a third inside a save. The others must be
gone within five seconds, and the launcher must name the lost rank. Then SIGSTOP freezes one rank,
which the others must name within `hang_seconds` and a half second and one more. After every blow
all published checkpoints are verified and the same command continues the run; when it is finished
its last checkpoint must be, bit for bit, that of a run with as many ranks which nobody disturbed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from benchmarks.machine import machine
from bigsimclr.engine.checkpoint import published, read_checkpoint
from bigsimclr.errors import CheckpointError, DistributedError
from bigsimclr.report.records import read_records
from bigsimclr.stages.run_directory import environment

GLOBAL_BATCH = 48  # goes evenly onto 2, 3 and 4 ranks
SAVE_EVERY = 2
RECIPE = """\
stage: pretrain
data: {{kind: digits}}
augment: {{image_size: 8, colour_strength: 0.5, blur_probability: 0.0}}
backbone: {{depth: 10, width: 0.0625, stem: cifar}}
head: {{layers: 2, output_width: 16}}
loss: {{kind: nt_xent, temperature: 0.5}}
optimizer: {{kind: lars, learning_rate: 0.1}}
schedule: {{steps: {steps}, warmup_epochs: 0.2}}
batch: {{global_batch: {batch}}}
parallel: {{device: cpu, cpu_threads: 1}}
checkpoint: {{every_steps: {every}, keep: 2}}
log: {{every_steps: 1}}
"""
GONE_SECONDS = 5.0
"""Longest time from the death of a rank until all of the job is gone."""
HANG_SECONDS = 3.0
NOTICE_SECONDS = HANG_SECONDS + 1.5
"""Longest time from the stop of a rank until the first other one has ended."""
PATIENCE = 300.0  # seconds that one attempt may take
LOST = re.compile(r"rank (\d+) \(pid (\d+)\) was lost \(SIGKILL\)")
SILENT = re.compile(r"rank (\d+) \(host \S+, pid (\d+)\) has shown no sign of life")

Kind = Literal["kill", "kill in training", "kill in save", "stop"]


class Verified(Protocol):
    """What is noted of checkpoints."""

    checkpoints_verified: int
    checkpoints_damaged: list[str]
    checkpoints_gone: int


@dataclass
class Findings:
    """What a storm over one number of ranks did and what it found."""

    runs: int = 0  # finished ones
    state_bitwise_equal: int = 0  # runs
    kills: int = 0
    kills_before_training: int = 0
    kills_in_save: int = 0  # that left an unfinished save behind
    kills_named: int = 0  # whose rank the launcher named, and no other
    seconds_until_gone: list[float] = field(default_factory=list)  # of each kill
    steps_lost: list[int] = field(default_factory=list)  # of each blow
    stops: int = 0
    stops_named: int = 0
    seconds_until_noticed: list[float] = field(default_factory=list)  # of each stop
    checkpoints_verified: int = 0
    checkpoints_damaged: list[str] = field(default_factory=list)
    checkpoints_gone: int = 0  # times that the newest was older than before
    left_alive: int = 0  # ranks that outlived their launcher
    unexpected_exits: list[int] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Say whether all promises were kept."""
        return (
            self.state_bitwise_equal == self.runs > 0
            and self.kills_named == self.kills
            and self.stops_named == self.stops
            and max(self.seconds_until_gone, default=0.0) < GONE_SECONDS
            and max(self.seconds_until_noticed, default=0.0) <= NOTICE_SECONDS
            # A save is published by the next one at the latest.
            and max(self.steps_lost, default=0) <= 2 * SAVE_EVERY
            and self.checkpoints_gone == self.left_alive == 0
            and not self.checkpoints_damaged
            and not self.unexpected_exits
        )


class Attempt:
    """One start of the command; its launcher and its ranks."""

    def __init__(self, recipe: Path, run: Path, ranks: int, *changes: str) -> None:
        words = ["run", str(recipe), *changes, "--ranks", str(ranks), "--out", str(run), "-q"]
        self._ranks, self._run = ranks, run
        self._began_at = time.time()
        self._trains = False
        self._log = run.with_suffix(".log")
        self._pids: dict[int, int] = {}  # rank -> process
        with self._log.open("w") as log:
            self._launcher = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, "-m", "bigsimclr", *words], stdout=log, stderr=log
            )

    @property
    def words(self) -> str:
        """What the command said."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def runs(self) -> bool:
        """Whether the launcher still does."""
        return self._launcher.poll() is None

    @property
    def trains(self) -> bool:
        """Whether an update of this attempt is recorded."""
        if not self._trains:
            times = [record.time for record in read_records(self._run)]
            self._trains = max(times, default=0.0) > self._began_at
        return self._trains

    def pids(self) -> dict[int, int]:
        """Look for the ranks, until all are known."""
        if len(self._pids) < self._ranks:
            for process in _children(self._launcher.pid):
                rank = _rank_of(process)
                if rank is not None:
                    self._pids[rank] = process
        return self._pids

    def wait_until(self, condition: Callable[[], bool], *, every: float = 0.01) -> bool:
        """Wait, as long as the launcher runs; return whether the condition came true."""
        end = time.monotonic() + PATIENCE
        while self.runs:
            if condition():
                return True
            if time.monotonic() > end:
                self.end_all()
                raise RuntimeError(f"nothing happened in {PATIENCE:g} s: {self.words[-4000:]}")
            time.sleep(every)
        return False

    def exit_code(self) -> int:
        """Wait for the launcher."""
        self.wait_until(lambda: False)
        return self._launcher.wait()

    def alive(self) -> list[int]:
        """Return the ranks that still run."""
        return [rank for rank, process in self._pids.items() if _lives(process)]

    def end_all(self) -> None:
        """Leave nothing behind."""
        for process in (self._launcher.pid, *self._pids.values()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._launcher.wait()


class Storm:
    """Runs of one recipe on one number of ranks, until all blows have struck.

    Args:
        directory: an empty directory for recipe and runs.
        ranks: number of ranks.
        steps: updates of each run.
        chooser: chooses the instants and the ranks.
    """

    def __init__(self, directory: Path, ranks: int, steps: int, chooser: random.Random) -> None:
        self.findings = Findings()
        self._directory, self._ranks, self._chooser = directory, ranks, chooser
        self._recipe = directory / "storm.yaml"
        self._recipe.write_text(RECIPE.format(steps=steps, batch=GLOBAL_BATCH, every=SAVE_EVERY))
        self._quiet = directory / "quiet"
        attempt = Attempt(self._recipe, self._quiet, ranks)
        began = time.monotonic()
        attempt.wait_until(lambda: attempt.trains)
        self._lead_seconds = time.monotonic() - began  # until the first update
        if (code := attempt.exit_code()) != 0:
            raise RuntimeError(f"the quiet run failed ({code}): {attempt.words[-4000:]}")
        self._train_seconds = time.monotonic() - began - self._lead_seconds

    def strike(self, kills: int, stops: int) -> Findings:
        """Strike until all is done.

        Args:
            kills: SIGKILLs; a third each at any instant, in training and in saves.
            stops: SIGSTOPs, after the kills.
        """
        kinds: list[Kind] = ["kill", "kill in training", "kill in save"]
        blows: list[Kind] = [kinds[number % 3] for number in range(kills)]
        self._chooser.shuffle(blows)
        blows[:0] = ["stop"] * stops  # taken from the end, so last
        while blows:
            run = self._directory / f"run-{self.findings.runs}"
            self._suffer(run, blows)
            self.findings.runs += 1
            self.findings.state_bitwise_equal += same_state(run, self._quiet)
            shutil.rmtree(run)
        return self.findings

    def _suffer(self, run: Path, blows: list[Kind]) -> None:
        """Start one run again until it is finished; take a blow off the list when it has struck."""
        found = self.findings
        while True:
            before = published(run / "checkpoints")
            kind = blows[-1] if blows else None
            changes = [f"parallel.hang_seconds={HANG_SECONDS:g}"] if kind == "stop" else []
            attempt = Attempt(self._recipe, run, self._ranks, *changes)
            try:
                struck = kind is not None and self._strike(attempt, kind, run)
                code = attempt.exit_code()
                found.left_alive += len(attempt.alive())
            finally:
                attempt.end_all()
            verify(before, published(run / "checkpoints"), found)
            if code == 0:
                return
            if struck:
                blows.pop()
                found.steps_lost.append(_steps_lost(run))
            else:
                found.unexpected_exits.append(code)
                print(attempt.words[-4000:], file=sys.stderr)
                if len(found.unexpected_exits) >= 3:
                    raise RuntimeError(f"the run fails by itself: {found.unexpected_exits}")

    def _strike(self, attempt: Attempt, kind: Kind, run: Path) -> bool:
        """Wait for the instant, send the signal, and note how the others took it.

        Returns:
            Whether a rank was there to be struck, and the job ended by it.
        """
        unfinished = _unfinished(run)
        self._wait_for_instant(attempt, kind, run)
        pids, trained = attempt.pids(), attempt.trains
        rank = self._chooser.choice(sorted(pids)) if pids else 0
        if not attempt.runs or not pids or not _lives(pids[rank]):
            return False
        named = [(str(rank), str(pids[rank]))]
        os.kill(pids[rank], signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        began = time.monotonic()
        found = self.findings
        if kind == "stop":
            others = pids.keys() - {rank}
            attempt.wait_until(lambda: not others <= set(attempt.alive()))
            seconds = round(time.monotonic() - began, 3)
            attempt.wait_until(lambda: time.monotonic() > began + seconds + GONE_SECONDS)
            # Others that had done their work have left it behind: that is no hang.
            with suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGCONT)
            if attempt.exit_code() != DistributedError.exit_code:
                return False
            found.stops += 1
            found.stops_named += SILENT.findall(attempt.words) == named
            found.seconds_until_noticed.append(seconds)
            return True
        if attempt.exit_code() != DistributedError.exit_code:
            return False
        found.seconds_until_gone.append(round(time.monotonic() - began, 3))
        found.kills += 1
        found.kills_before_training += not trained
        found.kills_in_save += bool(_unfinished(run) - unfinished)
        found.kills_named += LOST.findall(attempt.words) == named
        return True

    def _wait_for_instant(self, attempt: Attempt, kind: Kind, run: Path) -> None:
        if kind == "kill":
            attempt.wait_until(lambda: bool(attempt.pids()))
            pause = self._chooser.uniform(0, self._lead_seconds + self._train_seconds / 2)
        else:
            attempt.wait_until(lambda: attempt.trains and len(attempt.pids()) == self._ranks)
            pause = self._chooser.uniform(0, self._train_seconds / 2)
        end = time.monotonic() + pause
        attempt.wait_until(lambda: time.monotonic() >= end)
        if kind == "kill in save":
            unfinished = _unfinished(run)
            attempt.wait_until(lambda: bool(_unfinished(run) - unfinished), every=0.0005)
            # A save of this tiny network takes about as long.
            time.sleep(self._chooser.uniform(0, 0.004))


def verify(before: list[Path], after: list[Path], findings: Verified) -> None:
    """Read every published checkpoint, and note what is wrong with them.

    Args:
        before: what was published before the blow, newest first.
        after: what is published now.
        findings: where it is noted.
    """
    for path in after:
        try:
            read_checkpoint(path)
            findings.checkpoints_verified += 1
        except CheckpointError as error:
            findings.checkpoints_damaged.append(str(error))
    findings.checkpoints_gone += bool(before) and (not after or after[0] < before[0])


# --- processes -------------------------------------------------------------------------------


def _children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(state[1]) == parent:
                found.append(int(folder.name))
    return found


def _rank_of(process: int) -> int | None:
    """Read RANK from the environment a process was started with; None before it is a rank."""
    with suppress(OSError):
        for word in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                return int(word.partition(b"=")[2])
    return None


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# --- what a run directory holds --------------------------------------------------------------


def _unfinished(run: Path) -> set[Path]:
    """Saves and deletions that have begun."""
    return {path for kind in ("tmp", "del") for path in (run / "checkpoints").glob(f".{kind}-*")}


def _steps_lost(run: Path) -> int:
    there = published(run / "checkpoints")
    saved = int(there[0].name) // GLOBAL_BATCH if there else 0
    return max([saved, *(record.step for record in read_records(run))]) - saved


def same_state(run: Path, reference: Path) -> bool:
    """Say whether two runs ended with the same bits."""
    ours = read_checkpoint(published(run / "checkpoints")[0])
    theirs = read_checkpoint(published(reference / "checkpoints")[0])
    return ours.examples == theirs.examples and _bits(ours.tensors) == _bits(theirs.tensors)


def _bits(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, tuple[str, bytes]]:
    return {
        f"{section}.{name}": (
            f"{tensor.dtype} {list(tensor.shape)}",
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for section, named in tensors.items()
        for name, tensor in named.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each number of ranks")
    parser.add_argument("--stops", type=int, default=7, help="SIGSTOPs for each number of ranks")
    parser.add_argument("--steps", type=int, default=60, help="updates of each run")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instants and the ranks")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    started = time.monotonic()
    where = machine()
    chooser = random.Random(options.seed)  # noqa: S311 - instants, not secrets
    findings: dict[str, Findings] = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as directory:
            storm = Storm(Path(directory), ranks, options.steps, chooser)
            findings[str(ranks)] = storm.strike(options.kills, options.stops)
        # Written again after each number of ranks: an hour's findings survive a lost machine.
        result = {
            "command": " ".join(["python", "-m", "benchmarks.storm_ranks", *sys.argv[1:]]),
            "environment": {**environment(), **where},
            "seconds": round(time.monotonic() - started, 1),
            "good": all(found.good for found in findings.values()),
            "ranks": {number: asdict(found) for number, found in findings.items()},
        }
        text = json.dumps(result, indent=1) + "\n"
        print(text, end="", flush=True)
        if options.output is not None:
            options.output.write_text(text)
    sys.exit(0 if all(found.good for found in findings.values()) else 1)


if __name__ == "__main__":
    main()
