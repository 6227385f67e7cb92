"""What all commands share: errors that end in one line, and the arguments they name alike."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand
from typing_extensions import override

from bigsimclr.errors import BigSimCLRError, Elsewhere, Stopped

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name from `recipes ls`.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to change, such as schedule.epochs=5."),
]
OnlyOption = Annotated[
    str | None,
    typer.Option("--only", metavar="STEP", help="Of a pipeline, run this step alone."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


class Command(TyperCommand):
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
            raise typer.Exit(tell(error)) from None


def tell(error: BaseException) -> int:
    """Print what happened on standard error and return the exit code."""
    code = 1
    match error:
        case Elsewhere():
            lines, code = [], error.exit_code
        case Stopped():
            lines, code = [f"stopped: {error}"], error.exit_code
        case BigSimCLRError():
            lines, code = [f"error: {line}" for line in str(error).splitlines()], error.exit_code
        case KeyboardInterrupt():
            lines, code = [], 130  # `main` tells, since typer ends silently while it parses
        case _:
            what = " ".join(str(error).split())
            lines = [f"error: unexpected {type(error).__name__}: {what}; run again with --debug"]
    # In one write: several ranks share standard error, unbuffered in many containers.
    sys.stderr.write("".join(f"bigsimclr: {line}\n" for line in lines))
    return code
