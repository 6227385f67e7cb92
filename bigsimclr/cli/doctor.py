"""The command that looks at the machine, and lets it prove what it can do."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    *,
    dist: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Compare N processes of this machine with one, in seconds."
        ),
    ] = None,
) -> None:
    """Say what is installed and what the machine has.

    With --dist, compute the loss and gradient of a small network on N ranks and in one process,
    and fail where they differ.
    """
    from bigsimclr.doctor import check_ranks, describe

    if dist is None:
        print(describe(Path.cwd()))
        return
    code = check_ranks(dist, print)
    if code:
        raise typer.Exit(code)
