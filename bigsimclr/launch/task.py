"""One task of a Slurm job: a rank, or the torchrun that starts the ranks of a node.

    srun python -m bigsimclr.launch.task --notes FOLDER run RECIPE ...
    srun python -m bigsimclr.launch.task --notes FOLDER --torchrun 8 run RECIPE ...

Nothing heavy is imported before the task listens to signals: one that asks for a stop while the
rest is loaded ends it at once, as stopped on request.
"""

import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPED = 75
REQUESTS = (signal.SIGTERM, signal.SIGUSR2)


def main() -> None:
    """Take this task's part in the job."""
    words = sys.argv[1:]
    notes, words = Path(words[1]), words[2:]
    if words[0] == "--torchrun":
        _become_torchrun(int(words[1]), notes, words[2:])
    heard = _Listener()
    rank = _take_rank()
    code = 1
    try:
        sys.argv = ["bigsimclr", *words]
        runpy.run_module("bigsimclr", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        with suppress(OSError):  # a full disk must not change how the run ends
            note = {"code": code, "signals": heard.names()}
            (notes / f"rank-{rank}.json").write_text(json.dumps(note), encoding="utf-8")


class _Listener:
    """Remember every signal that this process gets, whoever handles it."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        # Python writes the number of each signal there before any handler of its own runs.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in REQUESTS:
            signal.signal(number, _leave)

    def names(self) -> list[str]:
        """Return the names of the signals, in their order."""
        with suppress(BlockingIOError):
            return [signal.Signals(number).name for number in os.read(self._read, 1024)]
        return []


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.stderr.write(f"bigsimclr: stopped: by {signal.Signals(number).name}, before training\n")
    sys.exit(STOPPED)


def _take_rank() -> str:
    """Say in torchrun's variables which rank this is, and return its number."""
    given = os.environ  # noqa: TID251 - allowed here
    if "TORCHELASTIC_RUN_ID" not in given:
        local = given["SLURM_LOCALID"]
        given["RANK"], given["WORLD_SIZE"] = given["SLURM_PROCID"], given["SLURM_NTASKS"]
        given["LOCAL_WORLD_SIZE"] = given.get("SLURM_NTASKS_PER_NODE", "1").partition("(")[0]
        # Where Slurm has given each task a GPU of its own, it is the only one that a task sees.
        alone = len(given.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1
        given["LOCAL_RANK"] = "0" if alone and given.get("CUDA_VISIBLE_DEVICES") else local
    return given["RANK"]


def _become_torchrun(ranks: int, notes: Path, words: list[str]) -> NoReturn:
    given = os.environ  # noqa: TID251 - allowed here
    # Slurm signals every process of a task. The ranks must save; torchrun would kill them first.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    given["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT"
    command = [
        sys.executable,
        *("-m", "torch.distributed.run"),
        *("--nnodes", given["SLURM_NNODES"], "--node-rank", given["SLURM_NODEID"]),
        *("--nproc-per-node", str(ranks)),
        *("--master-addr", given["MASTER_ADDR"], "--master-port", given["MASTER_PORT"]),
        *("-m", "bigsimclr.launch.task", "--notes", str(notes), *words),
    ]
    os.execv(sys.executable, command)  # noqa: S606 - our own command line, without a shell


if __name__ == "__main__":
    main()
