"""The command `bigsimclr`: each command a few lines; nothing heavy is imported before its use."""

import logging
import sys
from typing import Annotated, NoReturn

import typer

from bigsimclr.cli import cluster, doctor, inspecting, networks, packing, reading, running
from bigsimclr.cli.command import Command

_EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected, 2 usage or recipe, 3 data, 4 checkpoint, 5 numerics, "
    "6 a rank lost or hanging, 7 storage, 75 stopped on request: the same command continues, "
    "130 interrupted."
)

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
for _command in (
    running.run,
    running.check,
    running.report,
    cluster.submit,
    cluster.srun,
    cluster.runs,
    cluster.cancel,
    cluster.logs,
    doctor.doctor,
    reading.explain,
    reading.schema,
    networks.embed,
    networks.predict,
    networks.import_tf,
    networks.export,
):
    app.command(cls=Command)(_command)
recipes_app.command("ls", cls=Command)(reading.recipes_ls)
recipes_app.command("cat", cls=Command)(reading.recipes_cat)
recipes_app.command("cp", cls=Command)(reading.recipes_cp)
data_app.command("split", cls=Command)(reading.data_split)
data_app.command("pack", cls=Command)(packing.data_pack)
data_app.command("index", cls=Command)(packing.data_index)
data_app.command("scan", cls=Command)(inspecting.data_scan)
data_app.command("stats", cls=Command)(inspecting.data_stats)
data_app.command("preview", cls=Command)(inspecting.data_preview)


def main() -> NoReturn:
    """Run the command line; `--debug` and `--verbose` may stand anywhere in it."""
    words = sys.argv[1:]
    if "--" not in words:
        words.sort(key=lambda word: word not in {"--debug", "--verbose"})
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


def _show_log(wanted: bool) -> bool:
    if wanted:
        own = logging.getLogger("bigsimclr")
        own.addHandler(logging.StreamHandler())
        own.setLevel(logging.INFO)
    return wanted


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
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            callback=_show_log,
            help="Say which device, decoder and kernels are taken.",
        ),
    ] = False,
) -> None:
    """SimCLRv2 in PyTorch: pretrain, fine-tune on few labels, distil."""
