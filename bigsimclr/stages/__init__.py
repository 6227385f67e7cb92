"""Run a recipe, whatever its stage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bigsimclr.recipe.schema import PipelineRecipe, Recipe

if TYPE_CHECKING:
    from bigsimclr.world import World


def run_recipe(
    recipe: Recipe,
    *,
    name: str,
    out: Path | None = None,
    show: bool = False,
    source: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    command: str | None = None,
    only: str | None = None,
) -> Path:
    """Run a recipe to its end and write its report; the same call continues an unfinished run.

    In processes that torchrun or `--ranks` started, all of them make this call and share the work.

    Args:
        recipe: a stage or a pipeline.
        name: names the run directory `runs/NAME` when `out` is not given.
        out: the run directory.
        show: report progress on standard output.
        source: the recipe's file; a pipeline finds its stage recipes beside it.
        overrides: keys of a pipeline's stages; those of a single stage are in its recipe already.
        command: the command line that repeats this run; recorded for the report.
        only: of a pipeline, the one step to run.

    Returns:
        The run directory.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        BigSimCLRError: as the stage.
    """
    from bigsimclr.engine.stop import StopRequest
    from bigsimclr.errors import RecipeError
    from bigsimclr.recipe.pipeline import plan_pipeline
    from bigsimclr.report.html import write_report
    from bigsimclr.report.progress import show_progress
    from bigsimclr.stages.pipeline import run_pipeline
    from bigsimclr.stages.run_directory import add_command
    from bigsimclr.stages.single import run_stage
    from bigsimclr.world import join_world

    directory = out if out is not None else Path("runs") / name.replace("/", "-")
    with StopRequest() as stop, join_world() as world, _one_voice(world):
        progress = show_progress(enabled=show and world.rank == 0)
        if isinstance(recipe, PipelineRecipe):
            runs = plan_pipeline(
                recipe,
                source=source if source is not None else Path("pipeline.yaml"),
                overrides=overrides or {},
                directory=directory,
            )
            run_pipeline(
                recipe,
                runs,
                directory,
                command=command,
                world=world,
                progress=progress,
                stop=stop,
                only=only,
            )
        elif only is not None:
            raise RecipeError(f"--only {only}: the recipe is a single stage; leave it out")
        else:
            run_stage(recipe, directory, world=world, progress=progress, stop=stop)
            if command is not None and world.rank == 0:
                add_command(directory, command)
        if world.rank == 0:
            progress.note(f"report: {write_report(directory)}")
    return directory


@contextmanager
def _one_voice(world: "World") -> Iterator[None]:
    """Let the first rank tell what all ranks meet alike, and say so when one of them is gone."""
    from bigsimclr.errors import DistributedError, Elsewhere, NumericsError, Stopped

    try:
        yield
    except (Stopped, NumericsError) as error:
        if world.rank:
            raise Elsewhere(error.exit_code) from error
        raise
    except RuntimeError as error:
        if world.size == 1 or not world.is_loss(error):
            raise
        if world.rank:
            raise Elsewhere(DistributedError.exit_code) from error
        raise DistributedError(
            "another rank was lost; the same command continues from the last checkpoint "
            f"({' '.join(str(error).split())[:120]})"
        ) from error
