"""Stages run in order; what is finished is skipped."""

import json
from pathlib import Path

from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import Stopped
from bigsimclr.recipe.pipeline import PlannedRun
from bigsimclr.recipe.schema import PipelineRecipe
from bigsimclr.report.progress import Progress
from bigsimclr.stages.run_directory import write_json
from bigsimclr.stages.single import run_stage


def run_pipeline(
    recipe: PipelineRecipe,
    runs: list[PlannedRun],
    directory: Path,
    *,
    command: str | None,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """Run a pipeline to its end; finished runs are skipped.

    Raises:
        Stopped: a signal asked for it; the run in progress is saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "pipeline.yaml", json.loads(recipe.model_dump_json()))
    write_json(
        directory / "pipeline.json",
        {
            "name": directory.name,
            "command": command,
            "steps": [
                {
                    "name": step.name,
                    "stage": next(run.recipe.stage for run in runs if run.step == step.name),
                    "runs": [
                        {"path": run.path, "grid": dict(run.grid), "parent": run.parent}
                        for run in runs
                        if run.step == step.name
                    ],
                }
                for step in recipe.steps
            ],
        },
    )
    for number, run in enumerate(runs, start=1):
        progress.note(f"[{number}/{len(runs)}] {run.path}")
        run_stage(run.recipe, directory / run.path, progress=progress, stop=stop)
        if stop.received is not None:
            raise Stopped(
                f"stopping on {stop.received} after {run.path}; the same command continues"
            )
