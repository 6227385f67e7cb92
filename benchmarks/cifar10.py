"""CIFAR-10 in a few minutes of one GPU: accuracy by number of labels, and that from scratch.

Pretraining is timed for some updates first; then the epochs of pretraining and of distillation are
chosen so that the whole chain takes the time it is given. Everything else of the chain is that of
the recipes `cifar10/*`.

Run from the root of the repository: python -m benchmarks.cifar10 --data DIR
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import machine
from bigsimclr.stages.run_directory import environment

RESULTS = Path(__file__).parent / "results" / "cifar10.json"
# Other people's number for another budget, and so no measure of this run's success.
REFERENCE = (
    "ResNet-18 with the official code, 1000 epochs, linear evaluation: 92.06% "
    "(p3i0t/SimCLR-CIFAR10), about 91% (google-research/simclr README)"
)
PRETRAIN_SHARE = 0.58  # of the time
DISTILL_SHARE = 0.09  # of the time, for each of two
OTHER_STEPS = (
    "knn",
    "linear",
    "supervised_1pct",
    "supervised_10pct",
    "finetune_1pct",
    "finetune_10pct",
    "distill_1pct",
    "distill_10pct",
)
# A student's update needs its teacher's forward pass and its own three; pretraining's needs three
# of each of two views.
DISTILL_OVER_PRETRAIN = 6 / 4


# Pretraining gets a larger batch, and no neighbours on the way; linear evaluation a fifth of the
# recipe's epochs. The baselines get five times the epochs of fine-tuning on 1%, and twice on 10%.
SHORTER = {
    "pretrain.batch.global_batch": "1024",
    "pretrain.probe.knn_every_epochs": "null",
    "linear.schedule.epochs": "20",
    "supervised_1pct.schedule.epochs": "300",
    "supervised_1pct.schedule.warmup_epochs": "15",
    "supervised_10pct.schedule.epochs": "60",
    "supervised_10pct.schedule.warmup_epochs": "3",
}


@dataclass(frozen=True)
class Epochs:
    """How long the parts last that take what time there is."""

    pretrain: int
    distill: int

    @property
    def changes(self) -> dict[str, str]:
        """Return the recipe keys that say so.

        Warm-up takes a tenth of pretraining, and a twentieth of distillation as in the paper.
        """
        changes = {
            "pretrain.schedule.epochs": str(self.pretrain),
            "pretrain.schedule.warmup_epochs": f"{self.pretrain / 10:g}",
        }
        for step in ("distill_1pct", "distill_10pct"):
            changes[f"{step}.schedule.epochs"] = str(self.distill)
            changes[f"{step}.schedule.warmup_epochs"] = f"{self.distill / 20:g}"
        return changes


def common_changes(data: str, *, has_gpu: bool) -> dict[str, str]:
    """Return what differs from the recipes in every run of this benchmark."""
    return {
        "data.root": data,
        "input.resident": "true",
        "input.workers": "8" if has_gpu else "0",
        "parallel.precision": "bf16" if has_gpu else "fp32",
    }


def of_pretraining(changes: Mapping[str, str]) -> dict[str, str]:
    """Return those keys of the chain that are pretraining's, as its own recipe has them."""
    return {
        key.removeprefix("pretrain."): value
        for key, value in changes.items()
        if key.partition(".")[0] not in OTHER_STEPS
    }


def choose_epochs(images_per_second: float, *, seconds: float, images: int) -> Epochs:
    """Choose the epochs that fit, at least one each."""
    epochs_per_second = images_per_second / images
    return Epochs(
        pretrain=max(1, int(PRETRAIN_SHARE * seconds * epochs_per_second)),
        distill=max(1, int(DISTILL_SHARE * seconds * epochs_per_second * DISTILL_OVER_PRETRAIN)),
    )


def run(recipe: str, changes: Mapping[str, str], out: Path) -> list[str]:
    """Run a recipe in a process of its own; return the command, or end as it ended."""
    command = ["bigsimclr", "run", recipe, *(f"{key}={value}" for key, value in changes.items())]
    whole = [sys.executable, "-m", *command, "--out", str(out), "--quiet"]
    ended = subprocess.run(whole, check=False)  # noqa: S603 - made here
    if ended.returncode:
        sys.exit(ended.returncode)
    return command


def last_record(run_directory: Path) -> dict[str, float]:
    """Return the values of the last record of training."""
    lines = (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line)["values"] for line in lines]
    return next(values for values in reversed(records) if "train/images_per_second" in values)


def table(report: Mapping[str, list[dict[str, object]]]) -> list[str]:
    """Write the accuracies as lines for people."""
    return [f"{row['step']:<18}{float(str(row['accuracy'])):>7.1%}" for row in report["results"]]


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--timed-steps",
        type=int,
        default=60,
        help="updates timed beforehand, the last third of them",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE", help="further keys of all steps, to try it out"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    has_gpu = torch.cuda.is_available()
    facts = {**environment(), "machine": machine()}
    given = dict(change.split("=", 1) for change in arguments.changes)
    changes = SHORTER | common_changes(arguments.data, has_gpu=has_gpu) | given
    with tempfile.TemporaryDirectory() as scratch:
        timed, chain = Path(scratch) / "timed", Path(scratch) / "cifar10"
        length = {
            "schedule.steps": str(arguments.timed_steps),
            "schedule.epochs": "null",
            "schedule.warmup_epochs": "0",
            "log.every_steps": str(max(1, arguments.timed_steps // 3)),
        }
        run("cifar10/1_pretrain", of_pretraining(changes) | length, timed)
        rate = last_record(timed)["train/images_per_second"]
        images = json.loads((timed / "result.json").read_text(encoding="utf-8"))["data"]["train"]
        epochs = choose_epochs(rate, seconds=60 * arguments.minutes, images=images)
        command = run("cifar10", epochs.changes | changes, chain)
        seconds = time.monotonic() - started
        report = json.loads((chain / "report.json").read_text(encoding="utf-8"))
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.cifar10", *sys.argv[1:]]),
        "measured": shlex.join(command),
        "environment": facts,
        "minutes_given": arguments.minutes,
        "seconds": round(seconds, 1),
        "images_per_second": round(rate, 1),
        "pretrain_epochs": epochs.pretrain,
        "distill_epochs": epochs.distill,
        "reference": REFERENCE,
        "verdict": report["verdict"],
        "results": report["results"],
        "label_efficiency": report["label_efficiency"],
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*table(report), f"{seconds:.0f} s, {epochs.pretrain} epochs of pretraining"]))


if __name__ == "__main__":
    main()
