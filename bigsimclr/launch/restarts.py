"""What becomes of a job over its restarts: `RUN/slurm/JOB.jsonl`, and when to give up.

A line is written when an allocation begins and when it ends. One that Slurm took away, with the
node or by force, leaves no end.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bigsimclr.errors import DistributedError

PREEMPTED: Final = "preempted"
"""How an allocation ended that Slurm wanted for others: the run is not to blame."""


def progress_of(directory: Path) -> str:
    """Say how far the runs below a directory are, in a text that grows different with progress."""
    finished = sum(1 for _ in directory.rglob("result.json"))
    examples = 0
    for folder in directory.rglob("checkpoints"):
        names = [path.name for path in folder.iterdir() if path.name.isdecimal()]
        examples += max(map(int, names), default=0)
    return f"{finished} finished, {examples} examples"


class RestartLog:
    """The allocations of one job.

    Args:
        folder: of the run's job files; made if it is missing.
        job: number of the job, 12 or 12_3.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._path = folder / f"{job}.jsonl"
        self._job = job

    def begin(self, restart: int, progress: str, *, limit: int) -> None:
        """Note that an allocation begins.

        Args:
            restart: how often the job was started before.
            progress: of the run, as `progress_of` says it.
            limit: restarts in a row that may bring no progress.

        Raises:
            DistributedError: there were as many already; the job must not go on.
        """
        if self._fruitless(progress) > limit:
            raise DistributedError(
                f"job {self._job} was restarted {limit} times without progress ({progress}) and is "
                "not started again; its log says what ends it, and bigsimclr submit continues it"
            )
        self._write({"event": "began", "restart": restart, "progress": progress})

    def may_restart(self, progress: str, *, limit: int) -> bool:
        """Say whether another restart is within the limit."""
        return self._fruitless(progress) <= limit

    def end(self, restart: int, code: int, then: str) -> None:
        """Note that an allocation ends.

        Args:
            restart: how often the job was started before.
            code: exit code of its ranks.
            then: what becomes of the job.
        """
        self._write({"event": "ended", "restart": restart, "code": code, "then": then})

    def restarts(self) -> int:
        """Count the starts after the first."""
        return max(0, sum(line.get("event") == "began" for line in self.lines()) - 1)

    def _fruitless(self, progress: str) -> int:
        """Count the last allocations that all began where the run is now."""
        count = 0
        excused = False  # whether the allocation looked at was taken by Slurm
        for line in reversed(list(self.lines())):
            if line.get("event") == "ended":
                excused = line.get("then") == PREEMPTED
            elif line.get("progress") != progress:
                break
            else:
                count += not excused
                excused = False
        return count

    def _write(self, event: dict[str, object]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        line = json.dumps({**event, "time": time.time()}).encode() + b"\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = b"\n" + line  # what a lost node left torn stays a line of its own
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lines(self) -> Iterator[dict[str, object]]:
        """Read what was written, oldest first; torn lines are passed over."""
        if not self._path.exists():
            return
        for text in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line: object = json.loads(text)
            except ValueError:
                continue  # torn, by a node that was lost
            if isinstance(line, dict):
                yield line


def last_end(folder: Path, job: str) -> str | None:
    """Say how a job last ended, from its lines; None where it left none."""
    lines = list(RestartLog(folder, job).lines())
    if not lines or lines[-1].get("event") != "ended":
        return None
    then, code = lines[-1].get("then"), lines[-1].get("code")
    return f"{then} (exit {code})" if then == "failed" else str(then)
