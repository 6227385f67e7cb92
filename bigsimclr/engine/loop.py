"""The one training loop of every stage. Its only clock is the number of examples seen."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bigsimclr.data.loader import Batch, Loader
from bigsimclr.engine import Losses, MakeViews, Objective
from bigsimclr.engine.checkpoint import Checkpoint
from bigsimclr.engine.graph import GraphedGradients
from bigsimclr.engine.liveness import Pulse
from bigsimclr.engine.saving import Saver, Shares
from bigsimclr.engine.step import compute_gradients
from bigsimclr.engine.stop import Interrupted, StopRequest
from bigsimclr.errors import CheckpointError, NumericsError, Stopped
from bigsimclr.models.norm import average_running_statistics
from bigsimclr.optim.schedule import warmup_cosine
from bigsimclr.parallel import Strategy, Update
from bigsimclr.recipe.plan import Plan
from bigsimclr.world import World

logger = logging.getLogger(__name__)

SLOW_PHASE = 3.0  # times as long as an update may evaluation or saving go without progress

Report = Callable[[int, int, Mapping[str, float]], None]  # (examples, step, values)
Evaluate = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Intervals:
    """Updates between the things that do not happen in every update; None: only at the end."""

    record: int
    checkpoint: int | None
    evaluate: int | None


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
    graph: GraphedGradients | None  # for direct updates on a GPU
    world: World
    evaluate: Evaluate
    intervals: Intervals
    saver: Saver
    pulse: Pulse
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
        StorageError: there is no space for a checkpoint, or it cannot be written.
    """
    progress = Progress() if resume is None else _restore(run, resume)
    plan, world, saver, pulse = run.plan, run.world, run.saver, run.pulse
    _require_space(run, progress)
    started = time.monotonic() - progress.seconds
    window = _Window()
    batches = run.loader.batches(progress.step * plan.global_batch, plan.steps - progress.step)
    while True:
        last = progress.step == plan.steps
        # Evaluated after the checkpoint of the same step, so that nothing is lost if it fails.
        if last or _due(progress.step, run.intervals.evaluate):
            _evaluate(run, progress, started, stop, report)
        if last:
            break
        pulse.at("data", progress.step)
        if stop.agree(world) is not None:
            raise _stopped(run, progress, started, stop)
        window.begin()
        with world.together():
            batch = next(batches)
        window.waited()
        pulse.at("update", progress.step)
        losses, update, rate = _update(run, batch, progress.step)
        progress.step += 1
        last = progress.step == plan.steps
        recorded = last or progress.step % run.intervals.record == 0
        if recorded:
            progress.losses = _numbers(losses, update, world) | {"train/learning_rate": rate}
        pulse.step_took(window.end())
        if recorded:
            progress.losses |= window.rates(plan.global_batch)
            report(progress.step * plan.global_batch, progress.step, progress.losses)
            window = _Window()
        if last or _due(progress.step, run.intervals.checkpoint):
            _begin_save(run, progress, started)
        if last or saver.is_written():
            _finish_save(run, progress)
    if saver.newest is None:
        raise AssertionError("a finished run has a checkpoint")
    return Trained(
        examples=progress.step * plan.global_batch,
        checkpoint=saver.newest,
        values=progress.values,
        losses=progress.losses,
        seconds=time.monotonic() - started,
    )


def _evaluate(
    run: Run, progress: Progress, started: float, stop: StopRequest, report: Report
) -> None:
    run.pulse.at("evaluate", progress.step, allowance=SLOW_PHASE)
    average_running_statistics(run.objective.model, run.world)
    try:
        progress.values = dict(run.evaluate())
    except Interrupted:
        raise _stopped(run, progress, started, stop) from None
    if progress.values:
        report(progress.step * run.plan.global_batch, progress.step, progress.values)


class _Window:
    """Times the updates between two records; evaluation and saving do not count."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._began = time.perf_counter()
        self._own = 0.0  # seconds of the step in progress that no other rank can have caused

    def begin(self) -> None:
        self._began = time.perf_counter()

    def waited(self) -> None:
        """End the wait for data."""
        wait = time.perf_counter() - self._began
        self._waited += wait
        # A rank that waits for others computes nothing.
        self._own = wait - time.process_time()

    def end(self) -> float:
        """End a step, and return the seconds that it took on this rank's own account."""
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        return self._own + time.process_time()

    def rates(self, global_batch: int) -> dict[str, float]:
        return {
            "train/images_per_second": self._steps * global_batch / self._seconds,
            "train/data_wait": self._waited / self._seconds,
        }


def _stopped(run: Run, progress: Progress, started: float, stop: StopRequest) -> Stopped:
    """Save, and say so."""
    _begin_save(run, progress, started)
    path = _finish_save(run, progress)
    # Asked once more: a graver signal may have come to any rank during the save.
    name = stop.agree(run.world)
    return Stopped(
        f"by {name} at step {progress.step} of {run.plan.steps}; checkpoint {path} is "
        "written and the same command continues from it"
    )


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step > 0 and step % interval == 0


def _update(run: Run, batch: Batch, step: int) -> tuple[Losses, Update, float]:
    plan = run.plan
    rate = plan.peak_learning_rate * warmup_cosine(
        step, warmup_steps=plan.warmup_steps, total_steps=plan.steps
    )
    run.strategy.set_learning_rate(rate)
    try:
        if run.graph is not None:
            losses = run.graph(run.make_views(batch), batch)
        else:
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
        saved = run.saver.finish()  # a save in progress holds an earlier, finite state
        where = f"last good checkpoint: {saved}" if saved is not None else "no checkpoint yet"
        raise NumericsError(
            f"step {step}: {error}; {where}. Try a lower optimizer.learning_rate, or "
            "parallel.precision=fp32 where it is another"
        ) from error
    if not update.skipped:
        with run.strategy.compute():
            run.objective.after_update(
                batch.split(plan.micro_batch), run.make_views, run.strategy.whole()
            )
    return losses, update, rate


def _numbers(losses: Losses, update: Update, world: World) -> dict[str, float]:
    """Read the values of an update; each rank has those of its images, and the mean counts."""
    tensors: dict[str, Tensor] = {
        "train/loss": losses.total.detach(),
        "train/gradient_norm": update.gradient_norm,
        **losses.metrics,
    }
    own = torch.stack([tensor.to(torch.float64) for tensor in tensors.values()])
    numbers = dict(zip(tensors, world.gather(own).mean(0).tolist(), strict=True))
    return numbers | ({"train/skipped": 1.0} if update.skipped else {})


def _begin_save(run: Run, progress: Progress, started: float) -> None:
    run.pulse.at("save", progress.step, allowance=SLOW_PHASE)
    average_running_statistics(run.objective.model, run.world)
    progress.seconds = time.monotonic() - started
    run.saver.begin(
        examples=progress.step * run.plan.global_batch,
        tensors=_state(run),
        facts={
            **run.facts,
            "step": progress.step,
            "seconds": progress.seconds,
            "losses": progress.losses,
            "strategy": run.strategy.state(),
        },
    )


def _state(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return this rank's part of all that a checkpoint holds."""
    shares = Shares(run.world)
    # What is whole only one after the other must not stay on the device.
    on_host = run.world.size > 1
    model = {
        name: tensor.cpu() if on_host else tensor
        for piece in run.strategy.whole()
        for name, tensor in piece.items()
        if shares.is_kept(name, tensor.nbytes)
    }
    return {
        "model": model,
        "optimizer": run.strategy.optimizer_part(shares.is_kept),
        **{
            section: {name: t for name, t in named.items() if shares.is_kept(name, t.nbytes)}
            for section, named in run.objective.state().items()
        },
    }


def _require_space(run: Run, progress: Progress) -> None:
    """Refuse to train towards a checkpoint that would not fit on the disk."""
    if progress.step < run.plan.steps:
        run.saver.require_space(_state(run))


def _finish_save(run: Run, progress: Progress) -> Path | None:
    run.pulse.at("save", progress.step, allowance=SLOW_PHASE)
    saver = run.saver
    path = saver.finish()
    logger.info("checkpoint %s: training waited %.3f s", path, saver.blocked_seconds)
    saver.blocked_seconds = 0.0
    return path


def _restore(run: Run, checkpoint: Checkpoint) -> Progress:
    tensors, facts = checkpoint.tensors, checkpoint.facts
    run.strategy.load(tensors["model"], tensors["optimizer"])
    run.objective.restore(tensors)
    run.strategy.restore(_numbers_of(facts["strategy"]))
    run.saver.newest = checkpoint.path
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
