"""Several ranks on this machine: started, watched and ended together.

The ranks find torchrun's variables in their environment, so they cannot tell who started them.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self, TypeAlias

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported by torch

from bigsimclr.errors import INTERRUPTED, DistributedError, Stopped

POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0
"""Time in which the other ranks may notice a loss and end by themselves."""
KILLED_SECONDS = 2.0
"""Time that the system is given to remove a killed process."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
"""The signals that ask a run to stop, and the terminal's end, which no rank would see."""
HOST = "127.0.0.1"
ENDED_WELL = (0, Stopped.exit_code)

_Handler: TypeAlias = signal.Handlers | int | None


def is_rank() -> bool:
    """Say whether a launcher (ours, torchrun, srun) has made this process a rank of a run."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # noqa: TID251 - allowed here


def run_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Run `bigsimclr` with these arguments as several ranks, and return the job's exit code.

    It is 0 when all ranks are done and 75 when they have stopped on request; else that of the
    rank that failed first. As soon as one has failed, the others get two seconds to end, and are
    killed then.

    Signals that ask for a stop go to every rank. Only rank 0 writes on standard output.

    Raises:
        DistributedError: a rank was killed.
        Stopped: a signal that asks for a stop came before a rank could listen.
    """
    return run_command(ranks, [sys.executable, "-m", "bigsimclr", *arguments])


def run_command(ranks: int, command: Sequence[str]) -> int:
    """Run any command as `run_ranks` runs ours."""
    store = open_store(HOST)
    processes: list[subprocess.Popen[bytes]] = []
    with _Signals() as signals:
        try:
            for rank in range(ranks):
                environment = _environment(rank, ranks, store)
                processes.append(_start(command, rank, environment))
            return _Job(processes, signals).watch()
        finally:
            for process in processes:
                _kill(process)


def open_store(address: str) -> TCPStore:
    """Open the meeting point of ranks that this process starts.

    It outlasts a rank 0 that dies or hangs. It takes over a socket that is bound already, so that
    nobody else gets the port, and listens on one address only.

    Raises:
        OSError: this machine has no such address.
    """
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def meeting_point(store: TCPStore) -> dict[str, str]:
    """Return the variables by which ranks find a store."""
    return {
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there; rank 0 makes none
    }


def _environment(rank: int, ranks: int, store: TCPStore) -> dict[str, str]:
    inherited = dict(os.environ)  # noqa: TID251 - allowed here
    return {
        "OMP_NUM_THREADS": str(max(1, _cores() // ranks)),
        **inherited,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        **meeting_point(store),
    }


def _cores() -> int:
    # A container or a scheduler may grant fewer than the machine has.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _start(
    command: Sequence[str], rank: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # torch.distributed.elastic starts processes the same way, but answers the first failure with
    # SIGTERM and 30 s of waiting, inside the very call that polls. Our ranks take SIGTERM as a wish
    # to save, which they cannot fulfil without the lost one.
    return subprocess.Popen(  # noqa: S603 - our own command line, without a shell
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        # A Ctrl-C in the terminal then reaches only us, so that every rank gets it once. And a
        # rank can be killed together with its loader's workers.
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a rank, if it still runs, with all processes it has started."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # it waits in the kernel, for a disk or a GPU
            process.wait(KILLED_SECONDS)


class _Signals:
    """Collect the signals that ask to stop, until the ranks get them.

    Used as a context manager, which puts the earlier handlers back.
    """

    def __init__(self) -> None:
        self._waiting: list[signal.Signals] = []
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                self._previous[number] = signal.signal(number, self._note)  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def take(self) -> list[signal.Signals]:
        """Return the signals that came since the last call, oldest first."""
        taken, self._waiting = self._waiting, []
        return taken

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._waiting.append(signal.Signals(number))


@dataclass(frozen=True)
class _Failure:
    rank: int
    pid: int
    code: int  # as Popen gives it: negative for a signal
    poll: int  # number of the poll that found it

    @property
    def order(self) -> tuple[bool, int, bool]:
        """Sort the likely cause first.

        A rank that ends with 6 has only noticed another's failure, which may take longer to end.
        """
        return self.code == DistributedError.exit_code, self.poll, self.code > 0


class _Job:
    """The ranks, watched until all are gone."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], signals: _Signals) -> None:
        self._processes = processes
        self._signals = signals
        self._running = set(range(len(processes)))
        self._forwarded: list[signal.Signals] = []
        self._failures: list[_Failure] = []
        self._polls = 0

    def watch(self) -> int:
        """Wait until all ranks are gone, and return the job's exit code."""
        failed_at = deadline = math.inf
        while True:
            self._forward()
            self._note_ended()
            now = time.monotonic()
            if self._failures:
                failed_at = min(failed_at, now)
            if self._failures or self._forwarded.count(signal.SIGINT) > 1:
                deadline = min(deadline, now + GRACE_SECONDS)
            if not self._running or now >= deadline:
                break
            time.sleep(POLL_SECONDS)
        for rank in self._running:
            _kill(self._processes[rank])
        return self._exit_code(time.monotonic() - failed_at)

    def _forward(self) -> None:
        for number in self._signals.take():
            # A closed terminal is no reason to lose what can be saved.
            sent = signal.SIGTERM if number == signal.SIGHUP else number
            self._forwarded.append(sent)
            for rank in self._running:
                self._processes[rank].send_signal(sent)

    def _note_ended(self) -> None:
        self._polls += 1
        for rank in sorted(self._running):
            process = self._processes[rank]
            code = process.poll()
            if code is None:
                continue
            self._running.remove(rank)
            if code not in ENDED_WELL:
                self._failures.append(_Failure(rank, process.pid, code, self._polls))
                with suppress(ProcessLookupError):  # a killed rank cannot end its workers
                    os.killpg(process.pid, signal.SIGKILL)

    def _exit_code(self, seconds: float) -> int:
        if not self._failures:
            codes = {process.returncode for process in self._processes}
            if not codes <= set(ENDED_WELL):  # killed, after a second Ctrl-C
                return INTERRUPTED
            return max(codes)
        first = min(self._failures, key=lambda failure: failure.order)
        if first.code > 0:
            return first.code
        name = signal.Signals(-first.code).name
        if -first.code in self._forwarded:
            raise Stopped(
                f"by {name}, which rank {first.rank} could not hear yet; the same command continues"
            )
        raise DistributedError(
            f"rank {first.rank} (pid {first.pid}) was lost ({name}); "
            f"the other ranks were ended after {seconds:.1f} s. "
            "The same command continues from the last checkpoint."
        )
