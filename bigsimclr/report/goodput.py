"""Goodput: how much of what a run computed was kept, and what its interruptions cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from bigsimclr.report.attempts import Attempt
from bigsimclr.report.records import Record

_MOST: Final = 2**53  # steps; a damaged number must not overflow


@dataclass(frozen=True)
class Goodput:
    """What became of a run's steps and time over all its attempts."""

    kept: int  # steps on the way to where the run is
    computed: int  # the same and those that were computed again
    restarts: int  # attempts after the first
    seconds_lost: float  # between an attempt's end or last sign of life and the next one's begin

    @property
    def share(self) -> float | None:
        """Steps kept of those computed, 0 to 1; None: none has been computed."""
        return self.kept / self.computed if self.computed else None

    @property
    def words(self) -> str:
        """Say it in one line."""
        share = "" if self.share is None else f" {100 * self.share:.1f}%"
        restarts = "1 restart" if self.restarts == 1 else f"{self.restarts:,} restarts"
        minutes, seconds = divmod(round(self.seconds_lost), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"goodput{share}: {self.kept:,} of {self.computed:,} steps kept, {restarts}, "
            f"{hours}:{minutes:02d}:{seconds:02d} lost between attempts"
        )


def goodput_of(attempts: Sequence[Attempt], records: Sequence[Record]) -> Goodput | None:
    """Count what was kept and what was lost; None where no attempt is known.

    A killed attempt is taken to have ended with its last record, so that steps between two records
    may be missing in the count.

    Args:
        attempts: of one run, oldest first.
        records: of the same run, oldest first.
    """
    if not attempts:
        return None
    lost, seconds = 0, 0.0
    for attempt, later in pairwise(attempts):
        lost += max(0, _last_step(attempt, later.reached) - later.first_step)
        seconds += max(0.0, later.began - _last_life(attempt, later.alive))
    newest = attempts[-1]
    recorded = max((record.step for record in records), default=0)
    kept = _last_step(newest, min(recorded, _MOST))
    return Goodput(kept, kept + lost, len(attempts) - 1, seconds)


def _last_step(attempt: Attempt, recorded: int | None) -> int:
    if attempt.last_step is not None:
        return attempt.last_step
    return max(attempt.first_step, recorded or 0)


def _last_life(attempt: Attempt, recorded: float | None) -> float:
    if attempt.ended is not None:
        return attempt.ended
    return max(attempt.began, recorded or 0.0)
