"""Every stage on three ranks ends where it does in one process."""

from functools import partial
from pathlib import Path

import pytest

from bigsimclr.engine.stop import StopRequest
from bigsimclr.recipe.schema import AnyStage
from bigsimclr.report.progress import show_progress
from bigsimclr.stages.single import run_stage
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.distributed.test_resume import assert_close, newest, write_images
from tests.stages import tiny

pytestmark = pytest.mark.slow

COMMON = """
data: {kind: arrays, root: ROOT, held_out_fraction: 0.25}
parallel: {device: cpu, cpu_threads: 1}
"""
CROP = "augment: {image_size: 8}\n"
TRAINING = """
optimizer: {kind: lars, learning_rate: 0.01, rate_scaling: none}
schedule: {steps: 10, warmup_epochs: 0.5}
log: {every_steps: 5}
"""
NETWORK = """
backbone: {depth: 10, width: 0.125, stem: cifar}
head: {output_width: 16}
"""
WHOLE = "batch: {global_batch: 12}\n"
PRETRAIN = "stage: pretrain\naugment: {image_size: 8, colour_probability: 0, blur_probability: 0}\n"
STAGES = {
    "pretrain": PRETRAIN + NETWORK + TRAINING + WHOLE + "loss: {temperature: 0.5}\n",
    "knn": "stage: knn\n" + CROP,
    "linear": "stage: linear\n" + CROP + TRAINING + WHOLE,
    "finetune": "stage: finetune\nlabels: {per_class: 3}\n" + CROP + TRAINING + WHOLE,
    # Labels of a few images, which lie on the ranks unevenly.
    "distill": "stage: distill\nlabelled_weight: 0.5\nlabels: {per_class: 3}\n"
    + CROP + NETWORK + TRAINING + WHOLE,
}  # fmt: skip
PARENTS = {"knn": "pretrain", "linear": "pretrain", "finetune": "pretrain", "distill": "finetune"}


def recipe_of(folder: Path, stage: str) -> AnyStage:
    text = (STAGES[stage] + COMMON).replace("ROOT", str(folder / "images.npz"))
    parent = [f"parent={folder / PARENTS[stage]}"] if stage in PARENTS else []
    return tiny.recipe_of(text, *parent)


def run_all(world: World, folder: Path) -> dict[str, dict[str, float]]:
    found = {}
    for stage in STAGES:
        with StopRequest() as stop:
            result = run_stage(
                recipe_of(folder, stage),
                folder / stage,
                world=world,
                progress=show_progress(enabled=False),
                stop=stop,
            )
        found[stage] = dict(result.metrics)
    return found


def test_all_stages(tmp_path: Path) -> None:
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name / "images.npz")
    one = run_all(ALONE, tmp_path / "one")
    three = on_ranks(3, partial(run_all, folder=tmp_path / "three"))
    assert three[0] == three[1] == three[2]
    for stage, metrics in one.items():
        assert three[0][stage].keys() == metrics.keys()
        for name, value in metrics.items():
            assert three[0][stage][name] == pytest.approx(value, rel=1e-4), (stage, name)
        if stage != "knn":
            ours, theirs = newest(tmp_path / "three" / stage), newest(tmp_path / "one" / stage)
            assert_close(ours, theirs, 1e-5, sections=("model",))
