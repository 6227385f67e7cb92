"""Attempts of real runs: stopped, failed, killed and finished ones, and files that may be there."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from bigsimclr.engine.liveness import Pulse
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import NumericsError, RecipeError, Stopped, StorageError
from bigsimclr.recipe import parse_recipe
from bigsimclr.recipe.pipeline import plan_pipeline
from bigsimclr.recipe.schema import PipelineRecipe
from bigsimclr.report.attempts import Attempt, read_attempts
from bigsimclr.report.goodput import Goodput, goodput_of
from bigsimclr.report.progress import Progress
from bigsimclr.report.records import read_records
from bigsimclr.stages.pipeline import run_pipeline
from bigsimclr.stages.run_directory import ActiveRun, RunDirectory
from bigsimclr.stages.single import run_stage
from bigsimclr.stages.training import _noted_attempt
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.stages import tiny

pytestmark = pytest.mark.slow

KEYS = ("log.every_steps=1", "checkpoint.every_steps=4", "schedule.steps=12")


class At(Progress):
    """Does something when a step has been recorded."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        super().__init__(None, enabled=False)
        self._step, self._action = step, action

    def update(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._step and "train/loss" in values:
            self._action()


def attempt(directory: Path, step: int = 0, action: Callable[[], None] = lambda: None) -> Attempt:
    """Work on a run until it ends in any way, and return what is known of that."""
    recipe = tiny.recipe_of(tiny.PRETRAIN, *KEYS)
    with StopRequest() as stop:
        run_stage(recipe, directory, world=ALONE, progress=At(step, action), stop=stop)
    return read_attempts(directory)[-1]


def send(*signals: signal.Signals) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


def fail() -> None:
    raise ZeroDivisionError


def killed_at(directory: Path, step: int) -> None:
    child = os.fork()
    if child == 0:
        attempt(directory, step, lambda: send(signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_every_end_is_told_from_every_other(tmp_path: Path) -> None:
    killed_at(tmp_path, 6)
    times = [record.time for record in read_records(tmp_path)]
    with pytest.raises(Stopped, match="by SIGUSR2 at step 7"):
        attempt(tmp_path, 7, lambda: send(signal.SIGUSR2))
    with pytest.raises(Stopped, match="by SIGTERM at step 9"):
        attempt(tmp_path, 9, lambda: send(signal.SIGUSR2, signal.SIGTERM))
    with pytest.raises(ZeroDivisionError):
        attempt(tmp_path, 11, fail)
    attempt(tmp_path)
    killed, warned, stopped, failed, done = read_attempts(tmp_path)

    assert (killed.first_step, killed.ended, killed.reached, killed.alive) == (0, None, None, None)
    assert (killed.world_size, killed.job, killed.restart) == (1, None, 0)
    assert (warned.first_step, warned.last_step, warned.why) == (4, 7, "SIGUSR2")
    assert (warned.reached, warned.alive) == (6, times[-1])
    assert (stopped.first_step, stopped.last_step, stopped.why) == (7, 9, "SIGTERM")
    # Step 11 was recorded, but the loop had not gone on from it.
    assert (failed.first_step, failed.reached, failed.why) == (9, 9, "ZeroDivisionError")
    assert failed.last_step in {10, 11}
    assert (done.first_step, done.last_step, done.why) == (9, 12, "done")
    moments = [t for a in (killed, warned, stopped, failed, done) for t in (a.began, a.ended) if t]
    assert moments == sorted(moments)

    found = goodput_of(read_attempts(tmp_path), read_records(tmp_path))
    assert isinstance(found, Goodput)
    assert (found.kept, found.computed, found.restarts) == (12, 12 + 2 + failed.last_step - 9, 4)
    assert [record.step for record in read_records(tmp_path)].count(5) == 1
    assert found.seconds_lost > 0


def test_attempts_know_their_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    done = attempt(tmp_path)
    assert (done.job, done.restart) == ("41", 2)


@pytest.mark.parametrize(
    ("error", "size", "why"),
    [
        (RuntimeError("Connection closed by peer [10.0.0.2]:7"), 2, "DistributedError"),
        (RuntimeError("Connection closed by peer [10.0.0.2]:7"), 1, "RuntimeError"),
        (RuntimeError("shapes differ"), 2, "RuntimeError"),
        (NumericsError("nan"), 2, "NumericsError"),
        (KeyboardInterrupt(), 2, "KeyboardInterrupt"),
    ],
)
def test_a_lost_rank_is_told_from_other_errors(
    tmp_path: Path, error: BaseException, size: int, why: str
) -> None:
    world = World(0, size, torch.device("cpu"))
    pulse = Pulse(None, 0, size, hang_seconds=1.0, stacks=tmp_path / "stacks")
    pulse.at("update", 5)
    run = ActiveRun(RunDirectory(tmp_path), lambda: None, pulse)
    noted = _noted_attempt(run, 2, newest=[], world=world, stop=StopRequest())
    with pytest.raises(type(error)), noted:
        raise error
    (found,) = read_attempts(tmp_path)
    assert (found.first_step, found.last_step, found.why) == (2, 5, why)


def test_who_lost_the_run_writes_nothing_more(tmp_path: Path) -> None:
    def lose() -> None:
        (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')

    with pytest.raises(StorageError, match="was taken over by another process"):
        attempt(tmp_path, 6, lose)
    (lost,) = read_attempts(tmp_path)
    assert lost.ended is None
    assert [record.step for record in read_records(tmp_path)][-1] == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == [
        f"{4 * 32:012}"
    ]
    assert not (tmp_path / "result.json").exists()


class LoseAtEnd(Progress):
    """Lets somebody else take the run over when nothing but its result is missing."""

    def __init__(self, directory: Path) -> None:
        super().__init__(None, enabled=False)
        self._directory = directory

    def note(self, text: str) -> None:  # noqa: ARG002
        (self._directory / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')

    end = note


def test_who_lost_the_run_at_its_very_end_writes_no_result(tmp_path: Path) -> None:
    tiny.run(tiny.PRETRAIN, tmp_path / "parent")
    for text in (tiny.PRETRAIN, tiny.KNN + f"parent: {tmp_path / 'parent'}\n"):
        recipe = tiny.recipe_of(text)
        directory = tmp_path / recipe.stage
        refused = pytest.raises(StorageError, match="was taken over by another process")
        with refused, StopRequest() as stop:
            run_stage(recipe, directory, world=ALONE, progress=LoseAtEnd(directory), stop=stop)
        assert (directory / "recipe.yaml").exists()
        assert not (directory / "result.json").exists()


def test_the_launchers_folder_is_no_stranger(tmp_path: Path) -> None:
    for name in ("stage", "pipeline"):
        (tmp_path / name / "slurm").mkdir(parents=True)
        (tmp_path / name / "slurm" / "job.sh").write_text("")
    assert attempt(tmp_path / "stage").why == "done"
    (tmp_path / "one.yaml").write_text(tiny.SUPERVISED)
    recipe = parse_recipe(
        "stage: pipeline\nsteps: [{name: one, recipe: one.yaml}]\n", name="p.yaml"
    )
    assert isinstance(recipe, PipelineRecipe)
    directory = tmp_path / "pipeline"
    runs = plan_pipeline(recipe, source=tmp_path / "p.yaml", overrides={}, directory=directory)

    def run() -> None:
        with StopRequest() as stop:
            run_pipeline(
                recipe,
                runs,
                directory,
                command=None,
                world=ALONE,
                progress=Progress(None, enabled=False),
                stop=stop,
            )

    (directory / "stranger").mkdir()
    with pytest.raises(RecipeError, match="it holds stranger"):
        run()
    (directory / "stranger").rmdir()
    run()
    assert json.loads((directory / "one" / "result.json").read_text())["stage"] == "supervised"


class LateStop(StopRequest):
    """Rank 1 gets a graver signal when all have agreed to stop, so during the save."""

    def agree(self, world: World) -> str | None:
        found = super().agree(world)
        if found is not None and world.rank == 1:
            self._note(signal.SIGTERM, None)
        return found


def stop_on_ranks(world: World, directory: str) -> str:
    stop = LateStop()
    progress = At(3, lambda: stop._note(signal.SIGUSR2, None))
    recipe = tiny.recipe_of(tiny.PRETRAIN, *KEYS)
    with pytest.raises(Stopped) as stopped:
        run_stage(recipe, Path(directory), world=world, progress=progress, stop=stop)
    return str(stopped.value)


def test_a_late_signal_to_another_rank_is_known(tmp_path: Path) -> None:
    messages = on_ranks(2, partial(stop_on_ranks, directory=str(tmp_path)))
    assert all(message.startswith("by SIGTERM at step 3 of 12") for message in messages)
    (stopped,) = read_attempts(tmp_path)
    assert (stopped.world_size, stopped.last_step, stopped.why) == (2, 3, "SIGTERM")
