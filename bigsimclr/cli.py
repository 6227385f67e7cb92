"""The command `bigsimclr`: each command a few lines; nothing heavy is imported before its use."""

import json
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperCommand
from typing_extensions import override

from bigsimclr.errors import BigSimCLRError, RecipeError, Stopped

_EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected, 2 usage or recipe, 3 data, 4 checkpoint, 5 numerics, "
    "7 storage, 75 stopped on request: the same command continues, "
    "130 interrupted."
)


class _Command(TyperCommand):
    """A command that ends in one line on standard error, not in a traceback."""

    @override
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer bundles its own Context
        try:
            return super().invoke(ctx)
        except (typer.Exit, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place to tell the user
            if ctx.find_root().params["debug"]:
                traceback.print_exc()
            raise typer.Exit(_tell(error)) from None


def _tell(error: BaseException) -> int:
    """Print what happened on standard error and return the exit code."""
    code = 1
    match error:
        case Stopped():
            lines, code = [f"stopped: {error}"], error.exit_code
        case BigSimCLRError():
            lines, code = [f"error: {line}" for line in str(error).splitlines()], error.exit_code
        case KeyboardInterrupt():
            lines, code = [], 130  # `main` tells, since typer ends silently while it parses
        case _:
            what = " ".join(str(error).split())
            lines = [f"error: unexpected {type(error).__name__}: {what}; run again with --debug"]
    for line in lines:
        print(f"bigsimclr: {line}", file=sys.stderr)
    return code


app = typer.Typer(
    name="bigsimclr",
    help="SimCLRv2 in PyTorch: pretrain, fine-tune on few labels, distil.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that ship.", no_args_is_help=True)
data_app = typer.Typer(help="Work on image data.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name from `recipes ls`.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to change, such as schedule.epochs=5."),
]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def main() -> NoReturn:
    """Run the command line; `--debug` may stand anywhere in it."""
    words = sys.argv[1:]
    if "--debug" in words and "--" not in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    try:
        app(words, prog_name="bigsimclr")
    except SystemExit as end:
        if end.code == 130:
            print("bigsimclr: interrupted", file=sys.stderr)
        raise
    sys.exit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        from bigsimclr import __version__

        print(f"bigsimclr {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """SimCLRv2 in PyTorch: pretrain, fine-tune on few labels, distil."""


@app.command(cls=_Command)
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="RUN", help="Run directory; default: runs/RECIPE."),
    ] = None,
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

    from bigsimclr.stages import run_recipe

    run_recipe(
        loaded,
        name=run_name(recipe),
        out=out,
        show=not quiet,
        source=source,
        overrides=parse_overrides(changes) if is_pipeline(source) else None,
        command=shlex.join(["bigsimclr", "run", recipe, *changes]),
    )


@app.command(cls=_Command)
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    world_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of ranks to plan for.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print all defaults and what the recipe means here.

    Nothing is started. For a pipeline, one line for each run; with --json every run's defaults.
    """
    from bigsimclr.checking import check_recipe, pipeline_text, stage_text

    runs = check_recipe(recipe, overrides or [], world_size=world_size)
    if as_json:
        print(json.dumps([run.as_facts() for run in runs], indent=2))
    elif runs[0].path:
        print(pipeline_text(runs))
    else:
        print(stage_text(runs[0]))


@app.command(cls=_Command)
def explain(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key, such as loss.temperature.")
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Explain every key.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --all: the page docs/recipes.md.")
    ] = False,
) -> None:
    """Say what a key of a recipe means: type, range, default, source."""
    from bigsimclr.recipe.explain import explain as explain_key, explain_all

    if everything == (key is not None):
        raise RecipeError("explain: give either a key or --all")
    print(explain_all(markdown=markdown) if key is None else explain_key(key))


@app.command(cls=_Command)
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from bigsimclr.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@recipes_app.command("ls", cls=_Command)
def recipes_ls() -> None:
    """List the recipes that ship, each with the first line of its file."""
    from bigsimclr.recipe import find_recipe, list_recipes

    names = list_recipes()
    width = max((len(name) for name in names), default=0)
    for name in names:
        first = find_recipe(name).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('#').strip()}".rstrip())


@recipes_app.command("cat", cls=_Command)
def recipes_cat(name: RecipeArgument) -> None:
    """Print a recipe as its file has it."""
    from bigsimclr.recipe import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("cp", cls=_Command)
def recipes_cp(
    name: RecipeArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write; must not exist yet.")
    ],
) -> None:
    """Copy a recipe to a file of your own."""
    from bigsimclr.recipe import find_recipe

    text = find_recipe(name).read_text(encoding="utf-8")
    _write_new(file, text)
    print(f"{file}: a copy of {name}")


def _write_new(file: Path, text: str) -> None:
    from bigsimclr.errors import StorageError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = (
            "is a file, not a folder"
            if file.parent.exists()
            else f"cannot be made: {error.strerror}"
        )
        raise StorageError(f"{file.parent} {why}") from None
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        if file.exists():
            raise StorageError(f"{file} exists already; choose another name") from None
        raise StorageError(f"{file}: {error.strerror}") from None


@data_app.command("split", cls=_Command)
def data_split(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="List file to write.")],
    per_class: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Labelled images per class.")
    ] = None,
    percent: Annotated[
        float | None, typer.Option(metavar="P", help="Labelled share in percent.")
    ] = None,
    draw: Annotated[int, typer.Option(metavar="N", min=0, help="Number of the random draw.")] = 0,
) -> None:
    """Draw labelled images and write their names.

    They are drawn from the recipe's training images; with the same data keys, labels.list reads
    the file.
    """
    from bigsimclr.data import build_data
    from bigsimclr.data.subsets import select_labels, subset_hash
    from bigsimclr.recipe import load_recipe
    from bigsimclr.recipe.schema import PipelineRecipe

    if (per_class is None) == (percent is None):
        raise RecipeError("data split: give exactly one of --per-class and --percent")
    if percent is not None and not 0 < percent <= 100:
        raise RecipeError(f"data split: --percent {percent} is not in (0, 100]")
    loaded = load_recipe(recipe, overrides or ())
    if isinstance(loaded, PipelineRecipe):
        raise RecipeError(f"data split: {recipe} is a pipeline; name one of its stages' recipes")
    train = build_data(loaded.data).train
    chosen = select_labels(train, per_class=per_class, percent=percent, draw=draw)
    names = [train.name(int(index)) for index in chosen]
    _write_new(out, "".join(f"{name}\n" for name in names))
    print(f"{out}: {len(names)} of {len(train)} images, sha256 {subset_hash(names)}")


@app.command(cls=_Command)
def embed(
    run_directory: RunArgument,
    folder: FolderArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help=".npz file to write.")],
) -> None:
    """Write the features of a folder of images."""
    from bigsimclr.stages.embed import embed_to_file

    written = embed_to_file(run_directory, folder, out)
    print(f"{out}: features of {written.images} images{_left_out(written.unreadable)}")


@app.command(cls=_Command)
def predict(
    run_directory: RunArgument,
    folder: FolderArgument,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help=".csv file to write.")
    ] = Path("predictions.csv"),
) -> None:
    """Write the class of every image in a folder."""
    from bigsimclr.stages.embed import predict_to_file

    written = predict_to_file(run_directory, folder, out)
    print(f"{out}: classes of {written.images} images{_left_out(written.unreadable)}")


def _left_out(names: tuple[str, ...]) -> str:
    return f"; {len(names)} left out, unreadable: {', '.join(names[:3])}" if names else ""


@app.command(cls=_Command)
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
