"""What the Slurm cluster here does to a run: its limits, how it preempts, where runs may lie."""

import fcntl
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from bigsimclr.errors import RecipeError
from bigsimclr.launch import scheduler
from bigsimclr.launch.profile import Profile, load_profile, time_seconds
from bigsimclr.launch.submission import check_cluster

SHARED: Final = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.glusterfs",
    "wekafs",
)
"""Kinds of file systems that several nodes see."""
SHORT_GRACE: Final = 30  # seconds; less is tight for a checkpoint of a large network


def describe_cluster(folder: Path, profile_name: str | None) -> tuple[str, bool]:
    """Say what a job of this user would meet, one fact a line.

    Args:
        folder: where runs would lie.
        profile_name: a profile to hold against it; None: none.

    Returns:
        The text, and whether nothing stands in the way.

    Raises:
        RecipeError: the profile cannot be read.
        DistributedError: Slurm is not here, or does not answer.
    """
    profile = None if profile_name is None else load_profile(profile_name)
    settings = scheduler.settings()
    facts = [
        (
            "slurm",
            f"{settings.get('SLURM_VERSION', '?')}, cluster {settings.get('ClusterName', '?')}",
        ),
        ("submitit", _submitit()),
        *_partitions(scheduler.partitions()),
        ("preemption", _preemption(settings)),
        ("kill wait", _kill_wait(settings)),
        ("requeue", _requeue(settings)),
        ("cpu binding", _binding(settings)),
        ("accounting", _accounting(settings)),
        ("files", _files(folder)),
    ]
    fits = True
    if profile is not None and profile_name is not None:
        verdict, fits = _verdict(profile, profile_name)
        facts.append(("profile", verdict))
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts), fits


def _submitit() -> str:
    try:
        return metadata.version("submitit")
    except metadata.PackageNotFoundError:
        return "missing, and needed to submit: pip install 'bigsimclr[slurm]'"


def _partitions(found: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    lines = []
    for name, fields in found.items():
        default = " (default)" if fields.get("Default") == "YES" else ""
        grace = fields.get("GraceTime", "0")
        lines.append(
            (
                "partition",
                f"{name}{default}: {fields.get('State', '?').lower()}, "
                f"{fields.get('TotalNodes', '?')} nodes, at most {fields.get('MaxTime', '?')}, "
                f"preemption {fields.get('PreemptMode', '?').lower()}, {grace} s of grace",
            )
        )
    return lines


def _preemption(settings: Mapping[str, str]) -> str:
    kind, mode = settings.get("PreemptType", "(null)"), settings.get("PreemptMode", "OFF")
    if kind in ("(null)", "preempt/none") or mode == "OFF":
        return "none"
    told = settings.get("PreemptParameters", "") + settings.get("SlurmctldParameters", "")
    first = "SIGUSR2 and SIGTERM" if "send_user_signal" in told else "SIGTERM"
    text = f"{kind.removeprefix('preempt/')}, {mode.lower()}; a run gets {first}, and saves"
    if "REQUEUE" not in mode:
        text += "; where it cancels, submit again by hand"
    return text


def _kill_wait(settings: Mapping[str, str]) -> str:
    text = settings.get("KillWait", "?")
    number = text.partition(" ")[0]
    if number.isdecimal() and int(number) < SHORT_GRACE:
        return f"{text} between SIGTERM and the end: short for a checkpoint of a large network"
    return f"{text} between SIGTERM and the end"


def _requeue(settings: Mapping[str, str]) -> str:
    usual = (
        "allowed" if settings.get("JobRequeue") == "1" else "off by default, asked for by our jobs"
    )
    return f"{usual}; a requeued job waits about two minutes before it can start"


def _binding(settings: Mapping[str, str]) -> str:
    plugin = settings.get("TaskPlugin", "task/none")
    works = "affinity" in plugin or "cgroup" in plugin
    return plugin if works else f"{plugin}: cpu_binding has no effect here"


def _accounting(settings: Mapping[str, str]) -> str:
    kind = settings.get("AccountingStorageType", "none")
    return "none, and not needed" if kind.endswith("none") or kind == "(null)" else kind


def _files(folder: Path) -> str:
    place, kind = "/", "?"
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mounted, type_, *_ = line.split(" ")
        inside = folder.absolute().is_relative_to(mounted)
        if inside and len(mounted) >= len(place):
            place, kind = mounted, type_
    shared = (
        "seen by all nodes"
        if kind in SHARED
        else "perhaps of this machine alone: runs must lie where all nodes see them"
    )
    return f"{folder.absolute()} on {kind}, {shared}; {_locks(folder)}"


def _locks(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"files cannot be locked there ({error.strerror}): start no run twice"
    return "files can be locked"


def _verdict(profile: Profile, name: str) -> tuple[str, bool]:
    try:
        check_cluster(profile, name)
    except RecipeError as error:
        return str(error), False
    return (
        f"{name} fits: {profile.world_size} ranks; asked to save {profile.signal_seconds} s before "
        f"{time_seconds(profile.time) / 3600:g} h are over, up to a minute early",
        True,
    )
