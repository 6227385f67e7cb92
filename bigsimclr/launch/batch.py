"""The batch script of a Slurm job: start the ranks, watch them, decide what becomes of the job.

It runs on the first node, outside of the ranks, so that one process alone decides, after all of
them are gone. A requeued job begins here again; all that it needs is in the run directory.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, Literal, TypeVar

from bigsimclr.errors import INTERRUPTED, DistributedError, RecipeError, Stopped
from bigsimclr.launch import scheduler
from bigsimclr.launch.profile import Profile
from bigsimclr.launch.restarts import RestartLog, progress_of
from bigsimclr.launch.scheduler import JobFacts
from bigsimclr.report.attempts import FILE_NAME as ATTEMPTS, read_attempts

T = TypeVar("T")

POLL_SECONDS: Final = 0.2
LINGER_SECONDS: Final = 60
"""Seconds that the other tasks get after the first one ended; the report is written in them."""
WAITS: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0, 30.0)
"""Seconds between questions that Slurm did not answer."""
PATIENCE_SECONDS: Final = 900.0
"""Longest wait for Slurm to end a job that it wants to end."""
FORWARDED: Final = (signal.SIGTERM, signal.SIGUSR2)
WISHES: Final = frozenset(number.name for number in FORWARDED)
KILLED: Final = 128  # plus the signal's number, as srun and shells count

Then = Literal[
    "done", "failed", "stopped", "requeued", "preempted", "ended by Slurm", "left behind"
]


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given this job."""

    job: str  # number, as Slurm's commands take it
    name: str  # number, as people see it: 12, or 12_3 for an element of an array
    restart: int  # times that Slurm has started the job again
    nodes: tuple[str, ...]
    tasks: int
    cpus_per_task: str  # empty where the job does not say
    shell: int  # process that runs the batch script


def own_allocation() -> Allocation:
    """Find out what this job has.

    Raises:
        RecipeError: this is no batch script of Slurm.
    """
    from bigsimclr.world import own_job  # loads torch; dry runs do not

    job, number = own_job(), scheduler.inherited("SLURM_JOB_ID")
    listed = scheduler.inherited("SLURM_JOB_NODELIST")
    if job is None or not listed or scheduler.inherited("SLURM_PROCID", "0") != "0":
        raise RecipeError(
            "srun: this is not the batch script of a Slurm job; bigsimclr submit makes one, and "
            "slurm/train.sbatch is one to start from"
        )
    nodes = tuple(scheduler.node_names(listed))
    return Allocation(
        job=number,
        name=job.number,
        restart=job.restart,
        nodes=nodes,
        tasks=int(scheduler.inherited("SLURM_NTASKS") or len(nodes)),
        cpus_per_task=scheduler.inherited("SLURM_CPUS_PER_TASK"),
        shell=os.getppid(),
    )


def run_allocated(words: Sequence[str], *, profile: Profile, folder: Path, watched: Path) -> int:
    """Run `bigsimclr` with these words as the ranks of this job, and return the exit code.

    Args:
        words: what each rank runs.
        profile: how ranks are started, and when the job is requeued.
        folder: where the run keeps what it knows of its jobs.
        watched: directory whose checkpoints and results are the job's progress.

    Raises:
        RecipeError: this is no batch script of Slurm.
        DistributedError: Slurm does not answer; or too many restarts brought nothing.
        Stopped: the job could not be requeued.
    """
    job = own_allocation()
    log, limit = RestartLog(folder, job.name), profile.restarts_without_progress
    began = time.time()
    log.begin(job.restart, progress_of(watched), limit=limit)
    notes = folder / f"{job.name}-{job.restart}"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(mode=0o700)
    requests = _Requests()
    code = _code(_run_tasks(words, job, profile, notes, requests), notes)
    then: Then = "done" if code == 0 else "failed"
    signals: frozenset[str] = frozenset()
    if code == Stopped.exit_code or is_loss(code):
        signals = requests.heard | signals_of(watched, notes, since=began)
        then = _patiently(lambda: _decision(code, signals, job, profile))
    if then == "requeued" and not log.may_restart(progress_of(watched), limit=limit):
        log.end(job.restart, code, "failed")
        raise DistributedError(
            f"job {job.name} was restarted {limit} times without progress; not requeued"
        )
    if then == "requeued":
        then = _requeue(lambda: _decision(code, signals, job, profile), job)
    if then != "left behind":  # whose log is written by the later start now
        log.end(job.restart, code, then)
    _say_what_follows(then, job)
    return code


def is_loss(code: int) -> bool:
    """Say whether an exit code means that a rank or its node was lost, not that it refused."""
    return code == DistributedError.exit_code or (code > KILLED and code != INTERRUPTED)


def decide(
    code: int,
    signals: frozenset[str],
    facts: JobFacts | None,
    *,
    restart: int,
    profile: Profile,
) -> Then:
    """Say what becomes of a job whose ranks have ended unfinished.

    A job is requeued exactly once: by Slurm, where Slurm ends it for others or because of a node;
    by us, when its time is up or a rank was lost; by nobody, when a person cancelled it.

    Args:
        code: exit code of the ranks.
        signals: that came to any of them, or to the batch script.
        facts: of the job now; None where Slurm does not know it.
        restart: times that the job had been started again when this script began.
        profile: whether it may be requeued.
    """
    if facts is not None and facts.restarts != restart:
        return "left behind"  # Slurm has lost this node, and the job runs elsewhere by now
    if facts is not None and facts.state != "RUNNING":
        at_limit = facts.reason == "TimeLimit" and profile.requeue
        return "requeued" if at_limit else "ended by Slurm"
    if facts is not None and facts.is_preempted:
        return "preempted"
    if not profile.requeue:
        return "stopped" if code == Stopped.exit_code else "failed"
    if is_loss(code):
        return "requeued"
    # SIGTERM in a job that goes on running is a wish of somebody's, not the end of its time.
    return "requeued" if signals & {"SIGUSR2"} and "SIGTERM" not in signals else "stopped"


def signals_of(watched: Path, notes: Path, *, since: float) -> frozenset[str]:
    """Return the signals that asked the ranks of this allocation to stop.

    What the ranks agreed on counts. Before they trained, their notes count, of the first that
    ended: torchrun sends SIGTERM to those that are left.

    Args:
        watched: the run, or the runs below it.
        notes: what the ranks left.
        since: when this allocation began, unix seconds.
    """
    attempts = (a for path in watched.rglob(ATTEMPTS) for a in read_attempts(path.parent))
    ended = [(a.ended, a.why) for a in attempts if a.ended is not None and a.why is not None]
    newest = max(ended, default=(0.0, ""))
    if newest[0] >= since and newest[1] in WISHES:
        return frozenset({newest[1]})
    for path in sorted(notes.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns):
        names = _note(path).get("signals")
        found = frozenset(map(str, names)) if isinstance(names, list) else frozenset()
        if found & WISHES:
            return found
    return frozenset()


def _code(code: int, notes: Path) -> int:
    """Choose the exit code of the rank that was the cause, where ranks have left theirs."""
    found = (_note(path).get("code") for path in notes.glob("rank-*.json"))
    codes = {number for number in found if isinstance(number, int)}
    refusals = codes - {0, Stopped.exit_code, DistributedError.exit_code}
    if refusals:
        return min(refusals)
    if not code or not codes or (codes == {0} and code != 1):
        return code
    if DistributedError.exit_code not in codes and Stopped.exit_code in codes:
        return Stopped.exit_code  # torchrun ends with 1 whatever it was
    return DistributedError.exit_code  # of a rank that tells it, or that was killed beside others


def _note(path: Path) -> Mapping[str, object]:
    try:
        note: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


class _Requests:
    """Signals that ask to stop and come to the batch script, perhaps to it alone.

    Whoever ends the job for good does it with SIGKILL: the script stays deaf to the rest.
    """

    def __init__(self) -> None:
        self.heard: frozenset[str] = frozenset()
        self._is_passed_on = False
        for number in (*FORWARDED, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)

    def pass_on(self, srun: subprocess.Popen[bytes]) -> None:
        """Tell the ranks once, through srun.

        It hands SIGUSR2 on to all tasks; at SIGTERM it would kill them. Not through scancel, which
        tries again until the job runs, and would stop the start that comes after this one.
        """
        if self.heard & WISHES and not self._is_passed_on:
            self._is_passed_on = True
            srun.send_signal(signal.SIGUSR2)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.heard |= {signal.Signals(number).name}


def _run_tasks(
    words: Sequence[str], job: Allocation, profile: Profile, notes: Path, requests: _Requests
) -> int:
    """Run the ranks to their end, and return srun's exit code."""
    from bigsimclr.launch.local import meeting_point, open_store  # loads torch; dry runs do not

    address = scheduler.node_address(job.nodes[0])
    try:
        store = open_store(address)
    except OSError as error:
        raise DistributedError(
            f"the first node {job.nodes[0]} has no address {address} to meet at: {error.strerror}"
        ) from error
    environment = {**dict(os.environ), **meeting_point(store)}  # noqa: TID251 - allowed here
    # Not srun's --unbuffered: it gives each task a terminal, and progress would draw its bar.
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("OMP_NUM_THREADS", job.cpus_per_task or "1")
    python = sys.executable if profile.container is None else profile.container.python
    command = [*srun_words(job, profile), python]
    command += ["-m", "bigsimclr.launch.task", "--notes", str(notes)]
    if profile.launcher == "torchrun":
        environment |= {"MASTER_PORT": str(_free_port(address))}
        del environment["TORCHELASTIC_USE_AGENT_STORE"]  # its agent makes a store of its own
        command += ["--torchrun", str(job.tasks // len(job.nodes))]
    environment |= profile.environment
    # A session of its own: a signal to the batch script must not make srun kill the ranks.
    srun = subprocess.Popen(  # noqa: S603 - our own command line, without a shell
        [*command, *words], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    while srun.poll() is None:
        time.sleep(POLL_SECONDS)
        requests.pass_on(srun)
    return srun.returncode if srun.returncode >= 0 else KILLED - srun.returncode


def srun_words(job: Allocation, profile: Profile) -> list[str]:
    """Return the srun command that starts one task for each rank, or for each node."""
    per_node = profile.launcher == "torchrun"
    ranks = job.tasks // len(job.nodes)
    words = ["srun", "--kill-on-bad-exit=0", f"--wait={LINGER_SECONDS}"]
    words += [f"--nodes={len(job.nodes)}", f"--ntasks={len(job.nodes) if per_node else job.tasks}"]
    words += [f"--ntasks-per-node={1 if per_node else ranks}"]
    if job.cpus_per_task:  # newer versions of srun do not take it over from the job
        cpus = int(job.cpus_per_task) * (ranks if per_node else 1)
        words.append(f"--cpus-per-task={cpus}")
    words.append(f"--cpu-bind={'none' if per_node else profile.cpu_binding}")
    if profile.container is not None:
        words.append(f"--container-image={profile.container.image}")
        if profile.container.mounts:
            words.append(f"--container-mounts={','.join(profile.container.mounts)}")
    return words


def _decision(code: int, signals: frozenset[str], job: Allocation, profile: Profile) -> Then:
    facts = scheduler.job_facts(job.job)
    return decide(code, signals, facts, restart=job.restart, profile=profile)


def _requeue(decision: Callable[[], Then], job: Allocation) -> Then:
    """Requeue the job, unless somebody cancels it meanwhile; return what became of it.

    Raises:
        Stopped: Slurm did not do it.
    """

    def attempt() -> Then:
        then = decision()
        if then == "requeued":
            scheduler.requeue(job.job)
        return then

    try:
        return _patiently(attempt)
    except DistributedError as error:
        raise Stopped(
            f"job {job.name} has saved its state and could not be requeued ({error}); "
            "bigsimclr submit continues it"
        ) from error


def _say_what_follows(then: Then, job: Allocation) -> None:
    """Tell the log what becomes of the job, and let Slurm end it where Slurm has to."""
    match then:
        case "requeued":
            _say(f"job {job.name} is requeued, and continues when it starts again")
            _wait_for_the_end(job)
        case "preempted":
            # If the script ended in the time of grace, Slurm would take the job for done.
            _say(f"job {job.name} is preempted; Slurm requeues it")
            _wait_for_the_end(job)
        case "ended by Slurm":
            _wait_for_the_end(job)
        case "done" | "failed" | "stopped" | "left behind":
            pass


def _wait_for_the_end(job: Allocation) -> None:
    """Wait until Slurm ends this process, or the shell that runs the batch script."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if os.getppid() != job.shell:
            return
        time.sleep(POLL_SECONDS)
    _say(f"Slurm did not end job {job.name} in {PATIENCE_SECONDS:g} s")


def _patiently(question: Callable[[], T]) -> T:
    """Ask Slurm until it answers: its controller may be restarting."""
    for wait in WAITS:
        try:
            return question()
        except DistributedError as error:
            _say(str(error))
            time.sleep(wait)
    return question()


def _say(text: str) -> None:
    """Tell the job's log what becomes of the job."""
    sys.stderr.write(f"bigsimclr: {text}\n")
    sys.stderr.flush()


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
