"""The one training loop of every stage. Its only clock is the number of examples seen."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from bigsimclr.data.loader import Batch, Loader
from bigsimclr.engine import Losses, MakeViews, Objective
from bigsimclr.engine.checkpoint import Checkpoint, save_checkpoint
from bigsimclr.engine.step import compute_gradients
from bigsimclr.engine.stop import Interrupted, StopRequest
from bigsimclr.errors import CheckpointError, NumericsError, Stopped
from bigsimclr.optim import load_optimizer_state, optimizer_state, set_learning_rate
from bigsimclr.optim.schedule import warmup_cosine
from bigsimclr.parallel import Strategy, Update
from bigsimclr.recipe.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Report = Callable[[int, int, Mapping[str, float]], None]  # (examples, step, values)
Evaluate = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Intervals:
    """Updates between the things that do not happen in every update; None: only at the end."""

    record: int
    checkpoint: int | None
    evaluate: int | None
    keep: int  # checkpoints


@dataclass(frozen=True)
class Trained:
    """How a run ended."""

    examples: int
    checkpoint: Path
    values: Mapping[str, float]  # the last evaluation
    losses: Mapping[str, float]  # the last recorded training values
    seconds: float  # wall time of all attempts together


@dataclass
class Progress:
    """Where the loop stands; all of it is in every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Everything a training run consists of."""

    objective: Objective
    plan: Plan
    loader: Loader
    make_views: MakeViews
    strategy: Strategy
    optimizer: Optimizer
    evaluate: Evaluate
    intervals: Intervals
    checkpoints: Path  # the directory that holds them
    facts: Mapping[str, object]  # stored in every checkpoint: recipe, data, architecture


def train(run: Run, *, resume: Checkpoint | None, stop: StopRequest, report: Report) -> Trained:
    """Train from the beginning or from a checkpoint until the plan is fulfilled.

    Args:
        run: model, data, plan and policies.
        resume: state to continue from.
        stop: set by a signal; honoured after the update in progress.
        report: receives every record.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        NumericsError: a loss or gradient is not finite; the last checkpoint is intact.
    """
    progress = Progress() if resume is None else _restore(run, resume)
    plan = run.plan
    started = time.monotonic() - progress.seconds
    path = resume.path if resume is not None else None
    window = _Window()
    batches = run.loader.batches(progress.step * plan.global_batch, plan.steps - progress.step)
    while True:
        # Evaluated after the checkpoint of the same step, so that nothing is lost if it fails.
        if progress.step == plan.steps or _due(progress.step, run.intervals.evaluate):
            try:
                progress.values = dict(run.evaluate())
            except Interrupted:
                progress.seconds = time.monotonic() - started
                raise _stopped(stop, progress, plan, _save(run, progress)) from None
            if progress.values:
                report(progress.step * plan.global_batch, progress.step, progress.values)
        if progress.step == plan.steps:
            break
        window.begin()
        batch = next(batches)
        window.waited()
        losses, update, rate = _update(run, batch, progress.step, path)
        progress.step += 1
        last = progress.step == plan.steps
        if last or progress.step % run.intervals.record == 0:
            progress.losses = _numbers(losses, update) | {"train/learning_rate": rate}
            window.end()
            progress.losses |= window.rates(plan.global_batch)
            report(progress.step * plan.global_batch, progress.step, progress.losses)
            window = _Window()
        else:
            window.end()
        if last or stop.received is not None or _due(progress.step, run.intervals.checkpoint):
            progress.seconds = time.monotonic() - started
            path = _save(run, progress)
            if stop.received is not None and not last:
                raise _stopped(stop, progress, plan, path)
    if path is None:
        raise AssertionError("a finished run has a checkpoint")
    return Trained(
        examples=progress.step * plan.global_batch,
        checkpoint=path,
        values=progress.values,
        losses=progress.losses,
        seconds=time.monotonic() - started,
    )


class _Window:
    """Times the updates between two records; evaluation and saving do not count."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._began = time.perf_counter()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def waited(self) -> None:
        self._waited += time.perf_counter() - self._began

    def end(self) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def rates(self, global_batch: int) -> dict[str, float]:
        return {
            "train/images_per_second": self._steps * global_batch / self._seconds,
            "train/data_wait": self._waited / self._seconds,
        }


def _stopped(stop: StopRequest, progress: Progress, plan: Plan, path: Path) -> Stopped:
    return Stopped(
        f"by {stop.received} at step {progress.step} of {plan.steps}; checkpoint {path} is written "
        "and the same command continues from it"
    )


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step > 0 and step % interval == 0


def _update(run: Run, batch: Batch, step: int, saved: Path | None) -> tuple[Losses, Update, float]:
    plan = run.plan
    rate = plan.peak_learning_rate * warmup_cosine(
        step, warmup_steps=plan.warmup_steps, total_steps=plan.steps
    )
    set_learning_rate(run.optimizer, rate)
    try:
        losses = compute_gradients(
            run.objective,
            batch,
            how=plan.update,
            micro_batch=plan.micro_batch,
            make_views=run.make_views,
            strategy=run.strategy,
        )
        update = run.strategy.update()
    except NumericsError as error:
        where = f"last good checkpoint: {saved}" if saved is not None else "no checkpoint yet"
        raise NumericsError(
            f"step {step}: {error}; {where}. Try a lower optimizer.learning_rate or "
            "parallel.precision=fp32"
        ) from error
    if not update.skipped:
        run.objective.after_update(batch.split(plan.micro_batch), run.make_views)
    return losses, update, rate


def _numbers(losses: Losses, update: Update) -> dict[str, float]:
    tensors: dict[str, Tensor] = {
        "train/loss": losses.total.detach(),
        "train/gradient_norm": update.gradient_norm,
        **losses.metrics,
    }
    numbers = {name: float(value) for name, value in tensors.items()}
    return numbers | ({"train/skipped": 1.0} if update.skipped else {})


def _save(run: Run, progress: Progress) -> Path:
    return save_checkpoint(
        run.checkpoints,
        examples=progress.step * run.plan.global_batch,
        tensors={
            "model": run.objective.model.state_dict(),
            "optimizer": optimizer_state(run.optimizer),
            **run.objective.state(),
        },
        facts={
            **run.facts,
            "step": progress.step,
            "seconds": progress.seconds,
            "losses": progress.losses,
            "strategy": run.strategy.state(),
        },
        keep=run.intervals.keep,
    )


def _restore(run: Run, checkpoint: Checkpoint) -> Progress:
    tensors, facts = checkpoint.tensors, checkpoint.facts
    run.objective.model.load_state_dict(tensors["model"])
    load_optimizer_state(run.optimizer, tensors["optimizer"])
    run.objective.restore(tensors)
    run.strategy.restore(_numbers_of(facts["strategy"]))
    logger.info("continuing from %s", checkpoint.path)
    return Progress(
        step=checkpoint.examples // run.plan.global_batch,
        seconds=_number(facts["seconds"]),
        losses=_numbers_of(facts["losses"]),
    )


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise CheckpointError(f"a checkpoint holds {value!r} where a number belongs")
    return float(value)


def _numbers_of(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise CheckpointError(f"a checkpoint holds {value!r} where named numbers belong")
    return {str(name): _number(number) for name, number in value.items()}
