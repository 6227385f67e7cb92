"""The command that looks at the machine, and lets it prove what it can do."""

from pathlib import Path
from typing import Annotated

import typer

from bigsimclr.errors import RecipeError


def doctor(
    *,
    dist: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Compare N processes of this machine with one, in seconds."
        ),
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Say what the Slurm cluster here does to a run.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="PROFILE", help="With --slurm: hold a profile against it."),
    ] = None,
) -> None:
    """Say what is installed and what the machine has.

    With --dist, compute the loss and gradient of a small network on N ranks and in one process,
    and fail where they differ.
    """
    if slurm:
        from bigsimclr.launch.checkup import describe_cluster

        text, fits = describe_cluster(Path.cwd(), on)
        print(text)
        if not fits:
            raise typer.Exit(2)
        return
    if on is not None:
        raise RecipeError("doctor: --on goes with --slurm")
    from bigsimclr.doctor import check_ranks, describe

    if dist is None:
        print(describe(Path.cwd()))
        return
    code = check_ranks(dist, print)
    if code:
        raise typer.Exit(code)
