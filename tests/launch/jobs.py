"""Start the little job of `worker` as a process of its own, to send signals and read its words."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS = 60


class Job:
    """The launcher with its ranks."""

    def __init__(self, folder: Path, ranks: int, steps: int, hang_seconds: float, *trouble: str):
        self.folder, self.ranks = folder, ranks
        words = [str(ranks), str(folder), str(steps), str(hang_seconds), *trouble]
        # Files: a pipe that nobody reads would block.
        with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "tests.launch.worker", *words],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """Wait until all ranks train."""
        files = [self.folder / f"{rank}.pid" for rank in range(self.ranks)]
        end = time.monotonic() + SECONDS
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < end, "the ranks do not start"
            assert self.launcher.poll() is None, (self.folder / "err.txt").read_text()
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, standard output and standard error."""
        code = self.launcher.wait(timeout=SECONDS)
        return code, (self.folder / "out.txt").read_text(), (self.folder / "err.txt").read_text()


@contextmanager
def job(
    folder: Path, ranks: int, steps: int, *trouble: str, hang_seconds: float = 2.0
) -> Iterator[Job]:
    """Run a job; nothing of it is left behind."""
    started = Job(folder, ranks, steps, hang_seconds, *trouble)
    try:
        yield started
    finally:
        pids = [int(file.read_text() or 0) for file in folder.glob("*.pid")]
        for pid in [started.launcher.pid, *pids]:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        started.launcher.wait()


def seconds_until_gone(pids: list[int], since: float) -> float:
    """Wait until none of the processes is left."""
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < since + SECONDS, "a rank does not end"
        time.sleep(0.01)
    return time.monotonic() - since


def lives(pid: int) -> bool:
    """Say whether a process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
