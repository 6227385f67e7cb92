"""What all training stages have in common: from an objective to a finished run directory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from bigsimclr.data.loader import Loader
from bigsimclr.engine import Objective
from bigsimclr.engine.checkpoint import newest_checkpoint
from bigsimclr.engine.loop import Evaluate, Intervals, Run, Trained, train
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import RecipeError
from bigsimclr.models import Architecture
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel import MakeOptimizer, Strategy, build_strategy
from bigsimclr.recipe.plan import Plan, make_plan
from bigsimclr.recipe.schema import AnyTraining
from bigsimclr.report.progress import Progress
from bigsimclr.report.records import Records, read_records
from bigsimclr.stages.inputs import Inputs
from bigsimclr.stages.load import Loaded
from bigsimclr.stages.run_directory import (
    RunDirectory,
    check_same_origins,
    check_same_recipe,
    recipe_facts,
)
from bigsimclr.world import World


@dataclass(frozen=True)
class Task:
    """What a stage brings to the common part."""

    objective: Objective
    architecture: Architecture
    inputs: Inputs
    classes: tuple[str, ...]  # names of the classifier's outputs
    parent: Loaded | None  # the run this one builds on
    views: int  # random views of each image
    evaluate: Evaluate
    evaluate_every: int | None  # updates; None: only at the end


def plan_of(recipe: AnyTraining, inputs: Inputs, world: World) -> Plan:
    """Derive the plan for the images a stage walks through."""
    return make_plan(recipe, examples=len(inputs.indices), world_size=world.size)


def run_training(
    recipe: AnyTraining,
    task: Task,
    *,
    world: World,
    run: RunDirectory,
    progress: Progress,
    stop: StopRequest,
    title: str,
) -> Trained:
    """Train a stage to its end, continuing from the newest checkpoint if there is one.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        RecipeError: the directory holds a run of another recipe.
        CheckpointError: the directory holds checkpoints, none of them intact.
    """
    plan = plan_of(recipe, task.inputs, world)
    strategy = build_strategy(recipe.parallel, world)
    optimizer = strategy.prepare(task.objective.model, _optimizer_maker(recipe, plan))
    resume = newest_checkpoint(run.checkpoints)
    if resume is None:
        run.describe(recipe, plan.as_facts(), labels=task.inputs.label_names)
    else:
        check_same_recipe(recipe, resume.facts["recipe"], run.path)
        check_same_origins(_origins(task), resume.facts["origins"], run.path)
    records = Records(run.path, tensorboard=recipe.log.tensorboard)
    first = 0 if resume is None else resume.examples
    records.rewind(first)
    known = {(record.examples, *record.values) for record in read_records(run.path)}
    progress.begin(title, plan.steps, first // plan.global_batch, _headline(plan))
    chance = {} if plan.chance_loss is None else {"train/chance_loss": plan.chance_loss}

    def report(examples: int, step: int, values: Mapping[str, float]) -> None:
        both = {**values, **chance} if "train/loss" in values else values
        if (examples, *both) in known:
            return  # evaluated before the run was interrupted
        records.write(examples=examples, step=step, values=both)
        progress.update(step, both)

    loader = task.inputs.loader(recipe, views=task.views)
    try:
        with _explained_memory(plan):
            return train(
                _assemble(
                    recipe,
                    task,
                    plan=plan,
                    loader=loader,
                    strategy=strategy,
                    optimizer=optimizer,
                    run=run,
                ),
                resume=resume,
                stop=stop,
                report=report,
            )
    finally:
        run.note_unreadable(loader.unreadable)
        records.close()


def _origins(task: Task) -> dict[str, str | None]:
    held_out = task.inputs.held_out
    return {
        "training images": task.inputs.train.fingerprint,
        "held-out images": None if held_out is None else held_out.fingerprint,
        "labelled images": task.inputs.labels_hash,
        "parent": None if task.parent is None else task.parent.digest,
    }


@contextmanager
def _explained_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        smaller = (n for n in range(plan.micro_batch // 2, 0, -1) if plan.rank_batch % n == 0)
        raise RecipeError(
            f"batch.micro_batch: out of memory with {plan.micro_batch} images per forward pass; "
            f"batch.micro_batch={next(smaller, 1)} takes less for the same global batch "
            "(in a new --out if this run has a checkpoint)"
        ) from error


def _optimizer_maker(recipe: AnyTraining, plan: Plan) -> MakeOptimizer:
    def make(model: SimCLR) -> Optimizer:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return build_optimizer(
            recipe.optimizer, trained, parameter_kind(model), plan.peak_learning_rate
        )

    return make


def _assemble(
    recipe: AnyTraining,
    task: Task,
    *,
    plan: Plan,
    loader: Loader,
    strategy: Strategy,
    optimizer: Optimizer,
    run: RunDirectory,
) -> Run:
    return Run(
        objective=task.objective,
        plan=plan,
        loader=loader,
        make_views=task.inputs.views,
        strategy=strategy,
        optimizer=optimizer,
        evaluate=task.evaluate,
        intervals=Intervals(
            record=recipe.log.every_steps,
            checkpoint=recipe.checkpoint.every_steps,
            evaluate=task.evaluate_every,
            keep=recipe.checkpoint.keep,
        ),
        checkpoints=run.checkpoints,
        facts={
            "recipe": recipe_facts(recipe),
            "origins": _origins(task),
            "architecture": task.architecture.to_json(),
            "classes": list(task.classes),
        },
    )


def _headline(plan: Plan) -> str:
    text = f"{plan.examples:,} images, batch {plan.global_batch:,}, {plan.update} update"
    if plan.negatives is not None:
        text += f", {plan.negatives:,} negatives for every view"
    return text
