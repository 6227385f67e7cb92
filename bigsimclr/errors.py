"""The errors a user can cause or meet, each with the exit code the command line returns for it."""

from typing import ClassVar, Final

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, which is nobody's error."""


class BigSimCLRError(Exception):
    """Carry one line for the user: what was found, where, and what to do."""

    exit_code: ClassVar[int] = 1


class RecipeError(BigSimCLRError, ValueError):
    """A recipe, an override or a command line cannot be used as written."""

    exit_code = 2


class MissingExtraError(BigSimCLRError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""

    exit_code = 2


class DataError(BigSimCLRError):
    """Images or labels are missing, unreadable, or do not fit the recipe."""

    exit_code = 3


class CheckpointError(BigSimCLRError):
    """A checkpoint is damaged, missing, or belongs to another run."""

    exit_code = 4


class NumericsError(BigSimCLRError, ArithmeticError):
    """A loss or a gradient is not finite."""

    exit_code = 5


class DistributedError(BigSimCLRError):
    """A rank was lost, hangs, or differs from the others."""

    exit_code = 6


class Elsewhere(BigSimCLRError):  # noqa: N818 - an error of another rank
    """The first rank tells of an error; this one ends with the same exit code, and no word."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the first rank tells of an error with exit code {exit_code}")
        self.exit_code = exit_code  # type: ignore[misc] # the told error's, not this class's


class StorageError(BigSimCLRError, OSError):
    """The run directory cannot be written, or another process is writing it."""

    exit_code = 7


class Stopped(BigSimCLRError):  # noqa: N818 - a request, not a fault
    """The run was asked to stop, has saved its state, and continues with the same command."""

    exit_code = 75


def error_of(exit_code: int, message: str) -> BigSimCLRError:
    """Make an error again that another process met, from its exit code."""
    for kind in (RecipeError, DataError, CheckpointError, NumericsError, DistributedError):
        if kind.exit_code == exit_code:
            return kind(message)
    return StorageError(message) if exit_code == StorageError.exit_code else BigSimCLRError(message)
