"""Run a recipe, whatever its stage."""

from collections.abc import Mapping
from pathlib import Path

from bigsimclr.recipe.schema import PipelineRecipe, Recipe


def run_recipe(
    recipe: Recipe,
    *,
    name: str,
    out: Path | None = None,
    show: bool = False,
    source: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    command: str | None = None,
) -> Path:
    """Run a recipe to its end and write its report; the same call continues an unfinished run.

    Args:
        recipe: a stage or a pipeline.
        name: names the run directory `runs/NAME` when `out` is not given.
        out: the run directory.
        show: report progress on standard output.
        source: the recipe's file; a pipeline finds its stage recipes beside it.
        overrides: keys of a pipeline's stages; those of a single stage are in its recipe already.
        command: the command line that repeats this run; recorded for the report.

    Returns:
        The run directory.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        BigSimCLRError: as the stage.
    """
    from bigsimclr.engine.stop import StopRequest
    from bigsimclr.recipe.pipeline import plan_pipeline
    from bigsimclr.report.html import write_report
    from bigsimclr.report.progress import show_progress
    from bigsimclr.stages.pipeline import run_pipeline
    from bigsimclr.stages.run_directory import add_command
    from bigsimclr.stages.single import run_stage

    directory = out if out is not None else Path("runs") / name.replace("/", "-")
    progress = show_progress(enabled=show)
    with StopRequest() as stop:
        if isinstance(recipe, PipelineRecipe):
            runs = plan_pipeline(
                recipe,
                source=source if source is not None else Path("pipeline.yaml"),
                overrides=overrides or {},
                directory=directory,
            )
            run_pipeline(recipe, runs, directory, command=command, progress=progress, stop=stop)
        else:
            run_stage(recipe, directory, progress=progress, stop=stop)
            if command is not None:
                add_command(directory, command)
        report = write_report(directory)
    progress.note(f"report: {report}")
    return directory
