"""What all training stages have in common: from an objective to a finished run directory."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch

from bigsimclr.data.loader import Loader
from bigsimclr.engine import Objective
from bigsimclr.engine.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from bigsimclr.engine.graph import GraphedGradients
from bigsimclr.engine.loop import Evaluate, Intervals, Run, Trained, train
from bigsimclr.engine.saving import Saver
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import DistributedError, RecipeError, Stopped, StorageError
from bigsimclr.models import Architecture
from bigsimclr.models.fusing import fuse
from bigsimclr.models.memory import save_memory
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel import MakeOptimizer, Strategy, build_strategy
from bigsimclr.recipe.plan import Plan, make_plan
from bigsimclr.recipe.schema import AnyTraining, PretrainRecipe
from bigsimclr.report.attempts import note_began, note_ended
from bigsimclr.report.progress import Progress
from bigsimclr.report.records import Record, Records, read_records
from bigsimclr.stages.fitting import fitting_memory, fitting_micro_batch
from bigsimclr.stages.identity import image_changes, note_images
from bigsimclr.stages.inputs import Inputs
from bigsimclr.stages.load import Loaded
from bigsimclr.stages.run_directory import (
    ActiveRun,
    RunDirectory,
    check_same_origins,
    check_same_recipe,
    recipe_facts,
)
from bigsimclr.world import World, own_job

logger = logging.getLogger(__name__)


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
    run: ActiveRun,
    progress: Progress,
    stop: StopRequest,
    title: str,
) -> Trained:
    """Train a stage to its end, continuing from the newest checkpoint if there is one.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        RecipeError: the directory holds a run of another recipe.
        CheckpointError: the directory holds checkpoints, none of them intact.
        StorageError: the directory cannot be written, or was taken over.
    """
    model = task.objective.model
    _choose_code(recipe, task, world)
    world.check_same("images, labels or parent", json.dumps(_origins(task)))
    directory = run.directory
    resume = _newest(directory, world)
    plan = make_plan(
        recipe,
        examples=len(task.inputs.indices),
        world_size=world.size,
        micro_batch=fitting_micro_batch(
            recipe, task.objective, resume, views=task.views, world=world
        ),
    )
    strategy = build_strategy(recipe.parallel, world)
    strategy.prepare(model, _optimizer_maker(recipe, model, plan, fused=task.inputs.fused))
    _begin_or_continue(recipe, task, run, plan=plan, resume=resume)
    first = 0 if resume is None else resume.examples
    newest = read_records(directory.path)[-1:] if world.rank == 0 else []
    records = _records(recipe, directory, first) if world.rank == 0 else None
    known = _known(directory) if world.rank == 0 else set()
    progress.begin(title, plan.steps, first // plan.global_batch, _headline(plan))
    chance = {} if plan.chance_loss is None else {"train/chance_loss": plan.chance_loss}

    def report(examples: int, step: int, values: Mapping[str, float]) -> None:
        both = {**values, **chance} if "train/loss" in values else values
        with world.together():
            run.fence()
        if records is None or (examples, *both) in known:
            return  # another rank's task, or evaluated before the run was interrupted
        records.write(examples=examples, step=step, values=both)
        progress.update(step, both)

    loader = task.inputs.loader(recipe, views=task.views)
    assembled = _assemble(recipe, task, plan=plan, loader=loader, strategy=strategy, run=run)
    attempt = _noted_attempt(run, first // plan.global_batch, newest=newest, world=world, stop=stop)
    try:
        with attempt, _explained_memory(recipe, plan), assembled.graph or nullcontext():
            return train(assembled, resume=resume, stop=stop, report=report)
    finally:
        if records is not None:
            records.close()
            if loader.unreadable:
                run.fence()
                directory.note_unreadable(loader.unreadable)


def _choose_code(recipe: AnyTraining, task: Task, world: World) -> None:
    """Choose among the ways in which a network computes the same."""
    model = task.objective.model
    world.check_same("kernels", str(task.inputs.fused))
    if recipe.parallel.precision == "fp16" and world.device.type == "cpu" and world.rank == 0:
        logger.warning(
            "parallel.precision: most CPUs convolve in fp16 a hundred times as slowly as in fp32 or"
            " bf16"
        )
    if task.inputs.fused:
        # ZeRO-3 gathers a module's parameters around its own forward pass.
        fuse(model, bypass=recipe.parallel.strategy != "deepspeed_zero3")
    memory = fitting_memory(recipe, task.objective, views=task.views, world=world)
    save_memory(model, memory)


def _newest(run: RunDirectory, world: World) -> Checkpoint | None:
    """Read the newest intact checkpoint, the same on every rank."""
    newest: Checkpoint | None = None
    with world.together():
        if world.rank == 0:
            newest = newest_checkpoint(run.checkpoints)
    name = world.texts("" if newest is None else newest.path.name)[0]
    with world.together():
        if name and newest is None:
            newest = read_checkpoint(run.checkpoints / name)
    return newest


def _begin_or_continue(
    recipe: AnyTraining, task: Task, run: ActiveRun, *, plan: Plan, resume: Checkpoint | None
) -> None:
    """Describe a new run, or prove that this is the one that the checkpoint is of."""
    path, inputs = run.directory.path, task.inputs
    with inputs.world.together():
        run.fence()
        if resume is not None:
            check_same_recipe(recipe, resume.facts["recipe"], path)
            check_same_origins(
                _origins(task),
                resume.facts["origins"],
                path,
                explain=partial(image_changes, path, inputs.train, inputs.held_out),
            )
        elif inputs.world.rank == 0:
            note_images(path, inputs.train, inputs.held_out)
            run.directory.describe(recipe, plan.as_facts(), labels=task.inputs.label_names)


def _records(recipe: AnyTraining, run: RunDirectory, examples: int) -> Records:
    records = Records(run.path, tensorboard=recipe.log.tensorboard)
    records.rewind(examples)
    return records


def _known(run: RunDirectory) -> set[tuple[int | str, ...]]:
    return {(record.examples, *record.values) for record in read_records(run.path)}


@contextmanager
def _noted_attempt(
    run: ActiveRun, first: int, *, newest: Sequence[Record], world: World, stop: StopRequest
) -> Iterator[None]:
    """Note when this attempt to train begins and how it ends; the first rank does it.

    Args:
        run: the run.
        first: updates made by the checkpoint that it continues.
        newest: the last record before it, if there is one.
        world: the ranks.
        stop: says which signal ended it.
    """
    if world.rank:
        yield
        return
    path, job = run.directory.path, own_job()
    note_began(
        path,
        step=first,
        world_size=world.size,
        job=None if job is None else job.number,
        restart=0 if job is None else job.restart,
        reached=newest[0].step if newest else None,
        alive=newest[0].time if newest else None,
    )
    why = "done"
    try:
        yield
    except Stopped:
        why = stop.received or Stopped.__name__
        raise
    except BaseException as error:
        is_loss = isinstance(error, RuntimeError) and world.size > 1 and world.is_loss(error)
        why = DistributedError.__name__ if is_loss else type(error).__name__
        raise
    finally:
        with suppress(StorageError):  # whoever took the run over writes its attempts now
            run.fence()
            note_ended(path, step=max(first, run.pulse.step), why=why)


def _origins(task: Task) -> dict[str, str | None]:
    held_out = task.inputs.held_out
    return {
        "training images": task.inputs.train.fingerprint,
        "held-out images": None if held_out is None else held_out.fingerprint,
        "labelled images": task.inputs.labels_hash,
        "parent": None if task.parent is None else task.parent.digest,
    }


@contextmanager
def _explained_memory(recipe: AnyTraining, plan: Plan) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        smaller = (n for n in range(plan.micro_batch // 2, 0, -1) if plan.rank_batch % n == 0)
        advice = f"batch.micro_batch={next(smaller, 1)} takes less for the same global batch "
        advice += "(in a new --out if this run has a checkpoint)"
        if recipe.parallel.memory != "block":
            advice = f"parallel.memory=block takes less, with the same results; {advice}"
        raise RecipeError(
            f"batch.micro_batch: out of memory with {plan.micro_batch} images per forward pass; "
            f"{advice}"
        ) from error


def _optimizer_maker(
    recipe: AnyTraining, model: SimCLR, plan: Plan, *, fused: bool
) -> MakeOptimizer:
    return partial(
        build_optimizer,
        recipe.optimizer,
        kinds=parameter_kind(model),
        learning_rate=plan.peak_learning_rate,
        fused=fused,
    )


def _assemble(
    recipe: AnyTraining,
    task: Task,
    *,
    plan: Plan,
    loader: Loader,
    strategy: Strategy,
    run: ActiveRun,
) -> Run:
    return Run(
        objective=task.objective,
        plan=plan,
        loader=loader,
        make_views=task.inputs.views,
        strategy=strategy,
        graph=_graph(recipe, task, plan, strategy),
        world=task.inputs.world,
        evaluate=task.evaluate,
        intervals=Intervals(
            record=recipe.log.every_steps,
            checkpoint=recipe.checkpoint.every_steps,
            evaluate=task.evaluate_every,
        ),
        saver=Saver(
            run.directory.checkpoints,
            keep=recipe.checkpoint.keep,
            world=task.inputs.world,
            fence=run.fence,
        ),
        pulse=run.pulse,
        facts={
            "recipe": recipe_facts(recipe),
            "origins": _origins(task),
            "architecture": task.architecture.to_json(),
            "classes": list(task.classes),
            "micro_batch": plan.micro_batch,
        },
    )


def _graph(
    recipe: AnyTraining, task: Task, plan: Plan, strategy: Strategy
) -> GraphedGradients | None:
    """Return what records updates, where a recipe asks for it.

    Raises:
        RecipeError: this run cannot be recorded.
    """
    if not recipe.parallel.cuda_graph:
        return None
    if task.inputs.world.device.type != "cuda":
        raise RecipeError("parallel.cuda_graph: this run computes on a CPU; use false")
    if plan.update != "direct":
        raise RecipeError(
            f"parallel.cuda_graph: a {plan.update} update makes passes of several shapes; use "
            "false, or batch.micro_batch=null"
        )
    if isinstance(recipe, PretrainRecipe) and recipe.loss.queue is not None:
        raise RecipeError("parallel.cuda_graph: a queue that fills changes its shape; use false")
    return GraphedGradients(task.objective, strategy)


def _headline(plan: Plan) -> str:
    text = f"{plan.examples:,} images, batch {plan.global_batch:,}, {plan.update} update"
    if plan.negatives is not None:
        text += f", {plan.negatives:,} negatives for every view"
    return text
