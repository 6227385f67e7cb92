"""The smallest real runs: scanned digits, a tiny network, a few updates."""

from pathlib import Path

from bigsimclr.engine.stop import StopRequest
from bigsimclr.recipe import parse_recipe
from bigsimclr.recipe.schema import AnyStage, PipelineRecipe
from bigsimclr.report.progress import show_progress
from bigsimclr.stages.result import Result
from bigsimclr.stages.single import run_stage
from bigsimclr.world import ALONE

COMMON = """
data: {kind: digits}
parallel: {cpu_threads: 1}
"""
CROP = "augment: {image_size: 8, crop_area: [0.5, 1.0], flip_probability: 0.0}\n"
TRAINING = """
optimizer: {kind: lars, learning_rate: 0.5, rate_scaling: none}
schedule: {steps: 6}
batch: {global_batch: 32}
checkpoint: {every_steps: 2}
log: {every_steps: 2}
"""
BACKBONE = "backbone: {depth: 10, width: 0.0625, stem: cifar}\n"
PRETRAIN = (
    "stage: pretrain\naugment: {image_size: 8, colour_strength: 0.5, blur_probability: 0.0}\n"
    "head: {layers: 3, output_width: 16}\nprobe: {knn_every_epochs: 0.1}\n"
    + BACKBONE
    + COMMON
    + TRAINING
)
KNN = "stage: knn\n" + CROP + COMMON
LINEAR = "stage: linear\n" + CROP + COMMON + TRAINING
FINETUNE = "stage: finetune\nlabels: {per_class: 2}\n" + CROP + COMMON + TRAINING
SUPERVISED = "stage: supervised\nlabels: {per_class: 2}\n" + BACKBONE + CROP + COMMON + TRAINING
DISTILL = "stage: distill\n" + CROP + COMMON + TRAINING


def recipe_of(text: str, *overrides: str) -> AnyStage:
    recipe = parse_recipe(text, name="tiny.yaml", overrides=overrides)
    assert not isinstance(recipe, PipelineRecipe)
    return recipe


def run(text: str, directory: Path, *overrides: str) -> Result:
    with StopRequest() as stop:
        return run_stage(
            recipe_of(text, *overrides),
            directory,
            world=ALONE,
            progress=show_progress(enabled=False),
            stop=stop,
        )
