"""Kill a pretraining run again and again, and compare what it becomes with an undisturbed one.

    python -m benchmarks.storm --kills 20 --terms 20 -o benchmarks/results/storm.json

Half of the SIGKILLs come at uniformly random instants, half inside a save. SIGTERM must end the
run with exit code 75 and nothing lost. After every blow all published checkpoints are verified.
Attempts are forks of this process, which has imported everything and computed nothing, or with
`--fresh` new processes of the command line.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import sklearn.datasets  # noqa: F401 - imported here once, not in every fork
import torch

import bigsimclr.report.html
import bigsimclr.stages.pipeline
import bigsimclr.stages.single  # noqa: F401 - imported here once, not in every fork
from bigsimclr.engine.manifest import is_intact, read_manifest
from bigsimclr.errors import BigSimCLRError, Stopped
from bigsimclr.recipe import load_recipe
from bigsimclr.report.records import read_records
from bigsimclr.stages import run_recipe
from bigsimclr.stages.run_directory import environment

GLOBAL_BATCH = 64
SAVE_EVERY = 2
RECIPE = """\
stage: pretrain
data: {{kind: digits}}
augment: {{image_size: 8, colour_strength: 0.5, blur_probability: 0.0}}
backbone: {{depth: 10, width: 0.0625, stem: cifar}}
head: {{layers: 2, output_width: 16}}
loss: {{kind: nt_xent, temperature: 0.5{queue}}}
optimizer: {{kind: lars, learning_rate: 0.1}}
schedule: {{steps: {steps}, warmup_epochs: 0.2}}
batch: {{global_batch: {batch}}}
parallel: {{device: cpu, cpu_threads: 1}}
checkpoint: {{every_steps: {every}, keep: 2}}
log: {{every_steps: 1}}
"""
QUEUE = ", queue: {length: 256, ema_decay: 0.9}"

Kind = Literal["kill", "kill in save", "term"]
Start = Callable[[Path], int]  # run directory -> process id


@dataclass
class Findings:
    """What a storm did and what it found."""

    runs: int = 0  # finished ones
    kills: int = 0
    kills_in_save: int = 0  # that left an unfinished save behind
    terms: int = 0
    steps_lost_to_kills: list[int] = field(default_factory=list)  # of each kill
    steps_lost_to_terms: list[int] = field(default_factory=list)  # of each SIGTERM
    seconds_to_stop: list[float] = field(default_factory=list)  # from SIGTERM to exit code 75
    checkpoints_verified: int = 0
    checkpoints_damaged: int = 0
    checkpoints_gone: int = 0  # times that fewer were there than before, or older ones
    unexpected_exits: list[int] = field(default_factory=list)
    state_bitwise_equal: int = 0  # runs
    losses_equal: int = 0  # runs whose every recorded loss is there once and equal

    @property
    def good(self) -> bool:
        """Say whether all promises were kept."""
        return (
            self.state_bitwise_equal == self.losses_equal == self.runs > 0
            and max(self.steps_lost_to_kills, default=0) <= SAVE_EVERY
            and max(self.steps_lost_to_terms, default=0) == 0
            and self.checkpoints_damaged == self.checkpoints_gone == 0
            and not self.unexpected_exits
        )


def storm(
    directory: Path, *, kills: int, terms: int, steps: int, seed: int, queue: bool, fresh: bool
) -> Findings:
    """Run until all blows have struck and every run is finished.

    Args:
        directory: an empty directory for recipe and runs.
        kills: SIGKILLs; half of them aimed at saves.
        terms: SIGTERMs.
        steps: updates of each run.
        seed: chooses the instants.
        queue: train with a memory of projections, which is more state.
        fresh: start new processes instead of forks.
    """
    recipe = directory / "storm.yaml"
    recipe.write_text(
        RECIPE.format(
            steps=steps, batch=GLOBAL_BATCH, every=SAVE_EVERY, queue=QUEUE if queue else ""
        )
    )
    start = _starter(recipe, fresh=fresh)
    chooser = random.Random(seed)  # noqa: S311 - instants, not secrets
    reference = directory / "reference"
    if (code := _exit_code(start(reference))) != 0:
        raise RuntimeError(f"the undisturbed run failed ({code}): {_log(reference)}")
    seconds = _training_seconds(reference)
    counts: dict[Kind, int] = {
        "kill": kills - kills // 2,
        "kill in save": kills // 2,
        "term": terms,
    }
    blows = [kind for kind, count in counts.items() for _ in range(count)]
    chooser.shuffle(blows)
    findings = Findings()
    while blows:
        run = directory / f"run-{findings.runs}"
        _suffer(run, start, blows, findings=findings, chooser=chooser, seconds=seconds)
        findings.runs += 1
        findings.state_bitwise_equal += _state(run) == _state(reference)
        findings.losses_equal += _losses(run) == _losses(reference)
        shutil.rmtree(run)
    return findings


def _suffer(
    run: Path,
    start: Start,
    blows: list[Kind],
    *,
    findings: Findings,
    chooser: random.Random,
    seconds: float,
) -> None:
    """Restart one run until it is finished; take a blow off the list when it has struck."""
    while True:
        before = _published(run)
        unfinished = _unfinished(run)
        child = start(run)
        asked = _strike(child, blows[-1], run, chooser, seconds) if blows else 0.0
        code = _exit_code(child)
        ended = time.monotonic()
        after = _published(run)
        _verify(before, after, findings)
        if code == 0:
            return
        lost = _steps_lost(run, after)
        if code == -signal.SIGKILL:
            findings.kills += 1
            findings.kills_in_save += bool(_unfinished(run) - unfinished)
            findings.steps_lost_to_kills.append(lost)
            blows.pop()
        elif code == Stopped.exit_code:
            findings.terms += 1
            findings.steps_lost_to_terms.append(lost)
            findings.seconds_to_stop.append(round(ended - asked, 3))
            blows.pop()
        elif code != -signal.SIGTERM or lost:
            # SIGTERM before the run can listen, or after its last save, ends it without a loss.
            findings.unexpected_exits.append(code)
            print(_log(run), file=sys.stderr)
            if len(findings.unexpected_exits) >= 3:
                raise RuntimeError(f"the run fails by itself: {findings.unexpected_exits}")


def _strike(child: int, blow: Kind, run: Path, chooser: random.Random, seconds: float) -> float:
    """Wait for the instant, send the signal, and return the time when it was sent.

    Most instants lie in the training, which takes `seconds` in all; some plain kills strike the
    start of the process as well.
    """
    unfinished = _unfinished(run)
    if blow != "kill" or chooser.random() < 0.75:
        for _ in _while_running(child):
            if _listens(child):
                break
    end = time.monotonic() + chooser.uniform(0, seconds / 2)
    for _ in _while_running(child):
        if time.monotonic() >= end:
            break
    if blow == "kill in save":
        for _ in _while_running(child):
            if _unfinished(run) - unfinished:
                break
        time.sleep(chooser.uniform(0, 0.004))  # a save of this tiny network takes about as long
    os.kill(child, signal.SIGTERM if blow == "term" else signal.SIGKILL)
    return time.monotonic()


def _verify(before: list[Path], after: list[Path], findings: Findings) -> None:
    intact = [is_intact(path) for path in after]
    findings.checkpoints_verified += sum(intact)
    findings.checkpoints_damaged += len(intact) - sum(intact)
    findings.checkpoints_gone += len(after) < len(before) or after[-1:] < before[-1:]


# --- processes -------------------------------------------------------------------------------


def _starter(recipe: Path, *, fresh: bool) -> Start:
    def spawn(run: Path) -> int:
        command = [sys.executable, "-m", "bigsimclr", "run", str(recipe), "--out", str(run)]
        log = (os.POSIX_SPAWN_OPEN, 1, run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o600)
        return os.posix_spawn(
            sys.executable, command, os.environ, file_actions=[log, (os.POSIX_SPAWN_DUP2, 1, 2)]
        )

    def fork(run: Path) -> int:
        child = os.fork()
        if child == 0:
            _train(recipe, run)
        return child

    return spawn if fresh else fork


def _train(recipe: Path, run: Path) -> None:
    """Be the forked process: train and exit, without a return into the harness."""
    code = 1
    try:
        with run.with_suffix(".log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run_recipe(load_recipe(recipe), name="storm", out=run, show=False)
        code = 0
    except BigSimCLRError as error:
        code = error.exit_code
        traceback.print_exc()
    except BaseException:  # noqa: BLE001 - the parent reads the exit code and the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _while_running(child: int) -> Iterator[None]:
    """Yield every half millisecond until the process has ended; it is not reaped."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        yield
        time.sleep(0.0005)


def _exit_code(child: int) -> int:
    limit = time.monotonic() + 600
    for _ in _while_running(child):
        if time.monotonic() > limit:
            os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"process {child} neither ended nor stopped in 600 s")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _listens(child: int) -> bool:
    """Say whether the process has a handler for SIGTERM."""
    for line in Path(f"/proc/{child}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


# --- what a run directory holds --------------------------------------------------------------


def _published(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"))


def _unfinished(run: Path) -> set[Path]:
    """Saves and deletions that have begun."""
    return {path for kind in ("tmp", "del") for path in (run / "checkpoints").glob(f".{kind}-*")}


def _training_seconds(run: Path) -> float:
    facts = json.loads((_published(run)[-1] / "facts.json").read_text())
    return float(facts["seconds"])


def _steps_lost(run: Path, published: list[Path]) -> int:
    saved = int(published[-1].name) // GLOBAL_BATCH if published else 0
    return max([saved, *(record.step for record in read_records(run))]) - saved


def _state(run: Path) -> dict[str, str]:
    """Digests of the last checkpoint's tensors; equal tensors make equal files."""
    _, files = read_manifest(_published(run)[-1])
    digests = {file.name: file.sha256 for file in files if file.name.endswith(".safetensors")}
    return {"checkpoint": _published(run)[-1].name, **digests}


def _losses(run: Path) -> list[tuple[int, float]]:
    return [
        (record.examples, record.values["train/loss"])
        for record in read_records(run)
        if "train/loss" in record.values
    ]


def _log(run: Path) -> str:
    log = run.with_suffix(".log")
    return log.read_text()[-4000:] if log.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="updates of each run")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instants")
    parser.add_argument("--queue", action="store_true", help="train with a memory of projections")
    parser.add_argument("--fresh", action="store_true", help="new processes instead of forks")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        findings = storm(
            Path(directory),
            kills=options.kills,
            terms=options.terms,
            steps=options.steps,
            seed=options.seed,
            queue=options.queue,
            fresh=options.fresh,
        )
    result = {
        "command": " ".join(["python", "-m", "benchmarks.storm", *sys.argv[1:]]),
        "environment": {**environment(), "cpu_cores": os.cpu_count()},
        "seconds": round(time.monotonic() - started, 1),
        "good": findings.good,
        **asdict(findings),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)
    sys.exit(0 if findings.good else 1)


if __name__ == "__main__":
    main()
