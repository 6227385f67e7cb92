"""Commands that run a recipe or say what it means here."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from bigsimclr.cli.command import OnlyOption, OverridesArgument, RecipeArgument, RunArgument


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes on this machine; each GPU takes one."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="RUN", help="Run directory; default: runs/RECIPE."),
    ] = None,
    only: OnlyOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Report no progress.")] = False,
) -> None:
    """Run a recipe to its end, or continue it.

    The report is written last. The same command continues a stopped run.

    For a pipeline, KEY=VALUE changes every step that has the key, STEP.KEY=VALUE one step.
    """
    from bigsimclr.recipe import (
        find_recipe,
        is_pipeline,
        load_recipe,
        parse_overrides,
        run_name,
    )

    source = find_recipe(recipe)
    changes = overrides or []
    loaded = load_recipe(source, () if is_pipeline(source) else changes)
    words = ["run", recipe, *changes, *([] if ranks is None else ["--ranks", str(ranks)])]
    words += [] if only is None else ["--only", only]
    if ranks is not None and ranks > 1:
        from bigsimclr.launch.local import is_rank, run_ranks

        if not is_rank():
            place = [] if out is None else ["--out", str(out)]
            chosen = context.find_root().params
            options = ["--quiet"] * quiet + ["--debug"] * chosen["debug"]
            options += ["--verbose"] * chosen["verbose"]
            raise typer.Exit(run_ranks(ranks, [*words, *place, *options]))

    from bigsimclr.stages import run_recipe
    from bigsimclr.world import keep_freed_memory

    keep_freed_memory()
    run_recipe(
        loaded,
        name=run_name(recipe),
        out=out,
        show=not quiet,
        source=source,
        overrides=parse_overrides(changes) if is_pipeline(source) else None,
        command=shlex.join(["bigsimclr", *words]),
        only=only,
    )


def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of ranks to plan for.")
    ] = 1,
    examples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Training images to plan for where the data are not here."
        ),
    ] = None,
    gpus: Annotated[
        bool, typer.Option("--gpus", help="Add the memory per GPU of every strategy.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print all defaults and what the recipe means here.

    Nothing is started. For a pipeline, one line for each run; with --json every run's defaults.
    """
    from bigsimclr.checking import check_recipe, gpus_text, pipeline_text, stage_text

    runs = check_recipe(recipe, overrides or [], world_size=world_size, examples=examples)
    if as_json:
        facts = [run.as_facts() for run in runs]
        if gpus:
            for fact, run in zip(facts, runs, strict=True):
                fact["gpus"] = None if (table := run.gpus) is None else table.as_facts()
        print(json.dumps(facts, indent=2))
        return
    print(pipeline_text(runs) if runs[0].path else stage_text(runs[0]))
    if gpus:
        print(f"\n{gpus_text(runs)}")


def report(run_directory: RunArgument) -> None:
    """Write report.html and report.json of a run or a pipeline again."""
    from bigsimclr.errors import CheckpointError

    if not any((run_directory / name).is_file() for name in ("recipe.yaml", "pipeline.yaml")):
        what = "is not a run directory (no recipe.yaml or pipeline.yaml)"
        raise CheckpointError(
            f"{run_directory} {what if run_directory.is_dir() else 'is no folder'}"
        )

    from bigsimclr.report.html import write_report

    print(write_report(run_directory))
