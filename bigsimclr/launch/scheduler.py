"""Slurm's own commands, asked with a time limit, their answers as small frozen facts."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from bigsimclr.errors import DistributedError
from bigsimclr.recipe.yaml_tree import show

ANSWER_SECONDS: Final = 30.0
"""Time that one command may take: without its controller, Slurm's commands wait for minutes."""
ENDING: Final = ("COMPLETING", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "REQUEUED")
"""States in which Slurm is already taking the job's processes away."""
_FIELD: Final = re.compile(r"(\S+?)=(.*?)(?=\s\S+?=|$)")
_NEVER: Final = ("None", "Unknown", "N/A", "")


@dataclass(frozen=True)
class JobFacts:
    """What Slurm knows of a job."""

    state: str  # e.g. RUNNING
    reason: str  # why it waits or ends, e.g. TimeLimit
    restarts: int
    is_preempted: bool  # its time of grace runs
    ends_at: float | None  # unix seconds


@dataclass(frozen=True)
class QueuedJob:
    """One line of the queue."""

    state: str
    reason: str
    seconds: float  # that it has been running
    seconds_left: float | None


def ask(words: Sequence[str]) -> str:
    """Run one of Slurm's commands and return what it printed.

    Raises:
        DistributedError: the command is not here, does not answer, or refuses; in Slurm's words.
    """
    program = shutil.which(words[0])
    if program is None:
        raise DistributedError(
            f"Slurm's {words[0]} is not here; run this on a login node of the cluster, or train on "
            "this machine with: bigsimclr run"
        )
    try:
        answer = subprocess.run(  # noqa: S603 - a list of words, without a shell
            [program, *words[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DistributedError(
            f"Slurm does not answer within {ANSWER_SECONDS:g} s ({words[0]}); try again later"
        ) from None
    except OSError as error:
        raise DistributedError(f"{program} cannot be run: {error.strerror}") from error
    if answer.returncode:
        raise DistributedError(f"Slurm refuses: {complaint(answer.stderr, words[0])}")
    return answer.stdout


def complaint(stderr: str, program: str) -> str:
    """Return what a command of Slurm said, in one line."""
    lines = [line.removeprefix(f"{program}: ").strip() for line in stderr.splitlines()]
    lines = [line.removeprefix("error: ") for line in lines if line]
    return show("; ".join(dict.fromkeys(lines)) or f"{program} failed without a word", 400)


def job_facts(job: str) -> JobFacts | None:
    """Say what Slurm knows of a job; None when it has forgotten it.

    Raises:
        DistributedError: Slurm does not answer.
    """
    try:
        text = ask(["scontrol", "--oneliner", "show", "job", job])
    except DistributedError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    fields = _fields(text.partition("\n")[0])
    if not fields:
        return None
    return JobFacts(
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", "0")),
        is_preempted=fields.get("PreemptTime", "") not in _NEVER,
        ends_at=_moment(fields.get("EndTime", "")),
    )


def queue() -> Mapping[str, QueuedJob]:
    """List this user's jobs that wait or run, by number; elements of arrays as 12_3.

    Raises:
        DistributedError: Slurm does not answer.
    """
    text = ask(["squeue", "--noheader", "--me", "--array", "--format=%i|%T|%r|%M|%L"])
    found = {}
    for line in text.splitlines():
        number, state, reason, spent, left = line.split("|")
        found[number.strip()] = QueuedJob(state, reason, _span(spent) or 0.0, _span(left))
    return found


def requeue(job: str) -> None:
    """Put a running job back into the queue; its processes are ended by Slurm.

    Raises:
        DistributedError: Slurm refused, or does not answer.
    """
    try:
        ask(["scontrol", "requeue", job])
    except DistributedError as error:
        # An earlier try, whose answer was lost, has done it.
        if "pending execution" not in str(error).lower():
            raise


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are passed over.

    Raises:
        DistributedError: Slurm does not answer.
    """
    ask(["scancel", *jobs])


def partitions() -> Mapping[str, Mapping[str, str]]:
    """Return the partitions with their settings, as `scontrol show partition` names them.

    Raises:
        DistributedError: Slurm does not answer.
    """
    text = ask(["scontrol", "--oneliner", "show", "partition"])
    found = (_fields(line) for line in text.splitlines() if line.strip())
    return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def settings() -> Mapping[str, str]:
    """Return the cluster's settings, as `scontrol show config` names them.

    Raises:
        DistributedError: Slurm does not answer.
    """
    pairs = (line.partition("=") for line in ask(["scontrol", "show", "config"]).splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def node_address(node: str) -> str:
    """Return the address under which a node is reached.

    Raises:
        DistributedError: Slurm does not answer, or does not know the node.
    """
    text = ask(["scontrol", "--oneliner", "show", "node", node])
    return _fields(text.partition("\n")[0]).get("NodeAddr", node)


def node_names(listed: str) -> list[str]:
    """Spell out a list of nodes such as n[1-3].

    Raises:
        DistributedError: Slurm cannot read it.
    """
    return ask(["scontrol", "show", "hostnames", listed]).split()


def minutes(limit: str) -> int | None:
    """Read one of Slurm's time limits, D-HH:MM:SS; None when there is no limit."""
    seconds = _span(limit)
    return None if seconds is None else int(seconds // 60)


def _fields(line: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for match in _FIELD.finditer(line):
        found.setdefault(match[1], match[2])  # a path that comes later may hold anything
    return found


def _span(text: str) -> float | None:
    """Read [D-][[HH:]MM:]SS in seconds."""
    days, dash, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")):
        return None
    seconds = 0.0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return seconds + 86_400 * int(days) if dash else seconds


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        return None


def inherited(name: str, default: str = "") -> str:
    """Return what Slurm, or the user, says in this process's environment."""
    return os.environ.get(name, default)  # noqa: TID251 - allowed here
