"""Run directories as the stages write them, with numbers that look like a small real run."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

Change = Callable[[str], str]

AMOUNTS = (1, 2, 5)
DRAWS = (0, 1, 2, 3, 4)
MEANS = {
    "supervised": (0.72, 0.84, 0.93),
    "finetune": (0.81, 0.89, 0.952),
    "distill": (0.86, 0.92, 0.961),
}
OFFSETS = (-0.03, 0.01, 0.02, -0.01, 0.01)  # of the draws; they add up to 0
BACKBONE = "{kind: resnet, depth: 10, width: 0.25, selective_kernel: false, stem: cifar}"
HELD_OUT = 360
BATCH = 256


def accuracy(stage: str, per_class: int, draw: int) -> float:
    """Return a fabricated accuracy, a whole number of images of HELD_OUT."""
    mean = MEANS[stage][AMOUNTS.index(per_class)]
    return round(HELD_OUT * (mean + OFFSETS[draw] / per_class)) / HELD_OUT


def write(path: Path, content: object) -> None:
    """Write text as it is and anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def write_run(
    folder: Path,
    stage: str,
    *,
    recipe: str = "",
    metrics: dict[str, object] | None = None,
    protocol: dict[str, object] | None = None,
    parent: str | None = None,
    records: Sequence[dict[str, object]] = (),
    plan: dict[str, object] | None = None,
    change: Change = str,
) -> None:
    """Write the files of one run; without metrics it is unfinished."""
    write(folder / "recipe.yaml", f"stage: {stage}\nseed: 0\n{recipe}")
    write(
        folder / "plan.json", {"examples": 1437, "steps": 225, "global_batch": BATCH} | (plan or {})
    )
    environment = {"bigsimclr": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.2"}
    environment |= {
        "system": "Linux x86_64",
        "device": change("cpu"),
        "cpu_threads": 2,
        "commit": None,
    }
    write(folder / "environment.json", environment)
    write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    if metrics is None:
        return
    result = {
        "stage": change(stage),
        "examples": 57_600,
        "metrics": metrics,
        "protocol": {
            "encoder": change("frozen"),
            "head_layer": 0,
            "epochs": 40.08,
            "augmentation": change("crop"),
            "seed": 0,
            "n": HELD_OUT,
            "labels_per_class": None,
            "labels_percent": None,
            "draw": None,
            "checkpoint": change("last"),
        }
        | (protocol or {}),
        "parent": parent,
        "checkpoint": change("checkpoints/000000057600"),
        "seconds": 4.25,
        "data": {
            "fingerprint": "b1" * 32,
            "train": 1437,
            "held_out": HELD_OUT,
            "labels": 10,
            "labels_hash": change("c2" * 32),
        },
    }
    write(folder / "result.json", result)


def pretrain_records(steps: int = 225) -> list[dict[str, object]]:
    """Return the records of a pretraining that goes well."""
    chance = 2 * math.log(2 * BATCH - 1)
    found = []
    for step in range(5, steps + 1, 5):
        share = step / steps
        wave = math.sin(step / 7)
        values = {
            "train/loss": 4.1 + (chance - 4.1) * math.exp(-4 * share) + 0.12 * wave,
            "train/chance_loss": chance,
            "train/contrastive_accuracy": 0.62 * (1 - math.exp(-4 * share)) + 0.01 * wave,
            "train/contrastive_entropy": 5.9 * math.exp(-2 * share) + 0.3,
            "train/learning_rate": 0.002 * min(1.0, step / 12) * 0.5 * (1 + math.cos(3.14 * share)),
            "train/images_per_second": 2400 + 90 * wave,
            "train/data_wait": 0.02 + 0.01 * abs(wave),
            "train/gradient_norm": 1.2 + 3 * math.exp(-9 * share) + 0.1 * wave,
            "probe/loss": 2.3 * math.exp(-2 * share),
            "probe/accuracy": 0.1 + 0.8 * (1 - math.exp(-5 * share)),
        }
        found.append(
            {"examples": step * BATCH, "step": step, "time": 1e9 + step / 3, "values": values}
        )
        if step % 55 == 0 or step == steps:
            held_out = {
                "knn/accuracy": 0.985 - 0.2 * math.exp(-6 * share),
                "probe/held_out_accuracy": 0.93,
            }
            found.append({**found[-1], "values": held_out})
    return found


def classifier_records(final: float) -> list[dict[str, object]]:
    """Return the records of a classifier that ends at an accuracy."""
    return [
        {
            "examples": step * 64,
            "step": step,
            "time": 1e9 + step / 5,
            "values": {
                "train/loss": 2.3 * math.exp(-step / 20),
                "train/accuracy": 1 - 0.9 * math.exp(-step / 12),
            }
            | ({"held_out/accuracy": final} if step == 80 else {}),
        }
        for step in range(10, 81, 10)
    ]


def write_pipeline(
    root: Path,
    *,
    finished: Callable[[str], bool] = lambda _: True,
    started: Callable[[str], bool] = lambda _: True,
    change: Change = str,
    name: str = "digits",
) -> Path:
    """Write a whole pipeline directory; `finished` and `started` choose among the runs' paths."""
    steps: list[dict[str, object]] = []

    def add(step: str, runs: list[dict[str, object]]) -> None:
        steps.append({"name": step, "stage": step, "runs": runs})

    def place(step: str, **settings: object) -> None:
        path = str(settings.pop("path", step))
        if started(path):
            metrics = settings.pop("metrics")
            write_run(
                root / path,
                step,
                metrics=metrics if finished(path) else None,  # type: ignore[arg-type]
                change=change,
                **settings,  # type: ignore[arg-type]
            )

    note = f"# {change('a note')}\n"
    add("pretrain", [{"path": "pretrain", "grid": {}, "parent": None}])
    place(
        "pretrain",
        recipe=f"backbone: {BACKBONE}\nbatch: {{global_batch: {BATCH}}}\n{note}",
        metrics={"knn_accuracy": 0.985, "probe_accuracy": 0.93, "loss": 4.2},
        protocol={"augmentation": "crop, colour, blur"},
        records=pretrain_records(),
        plan={"chance_loss": 2 * math.log(2 * BATCH - 1), "negatives": 2 * BATCH - 2},
    )
    for stage, value in (("knn", 0.9833), ("linear", 0.9722)):
        add(stage, [{"path": stage, "grid": {}, "parent": "pretrain"}])
        place(
            stage,
            metrics={"accuracy": value},
            protocol={"labels_percent": 100.0, "draw": 0},
            parent="../pretrain",
        )
    for stage, encoder in (
        ("supervised", "from scratch"),
        ("finetune", "fine-tuned"),
        ("distill", "distilled"),
    ):
        runs: list[dict[str, object]] = []
        for per_class in AMOUNTS:
            for draw in DRAWS:
                label = f"per_class={per_class},draw={draw}"
                parent = {"finetune": "pretrain", "distill": f"finetune/{label}"}.get(stage)
                grid = {"labels.per_class": per_class, "labels.draw": draw}
                runs.append({"path": f"{stage}/{label}", "grid": grid, "parent": parent})
                own = {"labels_per_class": per_class, "draw": draw} if stage != "distill" else {}
                value = accuracy(stage, per_class, draw)
                place(
                    stage,
                    path=f"{stage}/{label}",
                    recipe=f"backbone: {BACKBONE}\n" if stage == "supervised" else "",
                    metrics={"accuracy": value, "loss": 0.1},
                    protocol={"encoder": encoder, "head_layer": int(stage == "finetune"), **own},
                    parent=None if parent is None else f"../../{parent}",
                    records=classifier_records(value),
                )
        add(stage, runs)
    write(root / "pipeline.yaml", f"stage: pipeline\n{note}")
    write(root / "pipeline.json", {"name": change(name), "steps": steps})
    return root
