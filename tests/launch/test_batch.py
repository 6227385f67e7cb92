"""What becomes of a job: every case of the decision, and what the ranks have left to decide by."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from bigsimclr.errors import DistributedError, RecipeError, Stopped
from bigsimclr.launch import batch
from bigsimclr.launch.batch import (
    Allocation,
    decide,
    is_loss,
    own_allocation,
    run_allocated,
    signals_of,
    srun_words,
)
from bigsimclr.launch.profile import Profile, load_profile
from bigsimclr.launch.restarts import RestartLog
from bigsimclr.launch.scheduler import JobFacts
from tests.launch.cluster import install

CODES = (0, 2, 3, 4, 5, 6, 7, 75, 137)
SIGNALS = ((), ("SIGUSR2",), ("SIGTERM",), ("SIGUSR2", "SIGTERM"))
# The state and the reason that Slurm gives, as seen on a real one.
STATES = (
    ("RUNNING", "None"),
    ("COMPLETING", "TimeLimit"),
    ("TIMEOUT", "TimeLimit"),
    ("COMPLETING", "None"),
    ("CANCELLED", "None"),
    ("PREEMPTED", "None"),
    ("NODE_FAIL", "NodeDown"),
    ("PENDING", "BeginTime"),
)


def profile_of(*, requeue: bool = True) -> Profile:
    return Profile(time="01:00:00", requeue=requeue)


def facts_of(
    state: str = "RUNNING", reason: str = "None", *, restarts: int = 0, is_preempted: bool = False
) -> JobFacts:
    return JobFacts(state, reason, restarts, is_preempted, None)


# --- the decision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_only_the_loss_of_a_rank_is_a_loss(code: int) -> None:
    assert is_loss(code) == (code in {6, 137})


@pytest.mark.parametrize("requeue", [True, False])
@pytest.mark.parametrize("code", [6, 75, 137])
def test_every_case(code: int, requeue: bool) -> None:
    """Whoever knows least about the job comes last: Slurm, then preemption, then the ranks."""
    profile = profile_of(requeue=requeue)
    for (state, reason), signals, is_preempted, restarts in itertools.product(
        STATES, SIGNALS, (False, True), (0, 1)
    ):
        facts = facts_of(state, reason, restarts=restarts, is_preempted=is_preempted)
        then = decide(code, frozenset(signals), facts, restart=0, profile=profile)
        case = (state, reason, signals, is_preempted, restarts)
        if restarts == 1:
            assert then == "left behind", case
        elif state in {"COMPLETING", "TIMEOUT"} and reason == "TimeLimit":
            assert then == ("requeued" if requeue else "ended by Slurm"), case
        elif state != "RUNNING":
            assert then == "ended by Slurm", case
        elif is_preempted:
            assert then == "preempted", case
        elif not requeue:
            assert then == ("stopped" if code == 75 else "failed"), case
        elif code != 75 or signals == ("SIGUSR2",):
            assert then == "requeued", case
        else:
            assert then == "stopped", case


@pytest.mark.parametrize(
    ("code", "signals", "requeue", "then"),
    [
        (75, {"SIGUSR2"}, True, "requeued"),
        (75, {"SIGTERM"}, True, "stopped"),
        (75, {"SIGUSR2", "SIGTERM"}, True, "stopped"),
        (75, set(), True, "stopped"),
        (75, {"SIGUSR2"}, False, "stopped"),
        (6, set(), True, "requeued"),
        (6, set(), False, "failed"),
        (137, {"SIGTERM"}, True, "requeued"),
        (137, set(), False, "failed"),
    ],
)
def test_a_job_that_slurm_does_not_know(
    code: int, signals: set[str], requeue: bool, then: str
) -> None:
    profile = profile_of(requeue=requeue)
    assert decide(code, frozenset(signals), None, restart=2, profile=profile) == then


def test_a_job_that_was_restarted_before() -> None:
    facts = facts_of(restarts=4)
    wish = frozenset({"SIGUSR2"})
    assert decide(75, wish, facts, restart=4, profile=profile_of()) == "requeued"
    assert decide(75, wish, facts, restart=3, profile=profile_of()) == "left behind"


# --- what the ranks have left ---------------------------------------------------------------------


def note(folder: Path, rank: int, code: object, *signals: str) -> None:
    (folder / f"rank-{rank}.json").write_text(json.dumps({"code": code, "signals": signals}))
    moment = 1_000_000_000 + len(list(folder.iterdir()))
    os.utime(folder / f"rank-{rank}.json", (moment, moment))


@pytest.mark.parametrize(
    ("code", "left", "expected"),
    [
        (0, [0, 0], 0),
        (75, [75, 75], 75),
        (1, [75, 75], 75),  # torchrun ends with 1 whatever it was
        (1, [75, 0], 75),
        (3, [3, 3], 3),
        (1, [3, 6], 3),  # the others of a rank that refuses are lost to it
        (1, [6, 6], 6),
        (6, [75, 6], 6),
        (137, [6], 6),
        (137, [75], 75),
        (137, [], 137),
        (1, [], 1),
        (0, [], 0),
        (5, [5, 75, 4], 4),
        (0, [None, "x", 0], 0),  # damaged
        # A rank that was done says nothing of the one that was killed.
        (137, [0], 137),
        (75, [0], 75),
        (1, [0], 6),
    ],
)
def test_the_code_of_the_rank_that_was_the_cause(
    tmp_path: Path, code: int, left: list[object], expected: int
) -> None:
    for rank, found in enumerate(left):
        note(tmp_path, rank, found)
    assert batch._code(code, tmp_path) == expected


def test_damaged_notes_are_passed_over(tmp_path: Path) -> None:
    for rank, content in enumerate([b"", b"\xff", b"[75]", b'{"code": 75, "sig', b"null"]):
        (tmp_path / f"rank-{rank}.json").write_bytes(content)
    assert batch._code(1, tmp_path) == 1
    assert signals_of(tmp_path, tmp_path, since=0) == frozenset()
    note(tmp_path, 9, 75, "SIGUSR2")
    assert batch._code(1, tmp_path) == 75
    assert signals_of(tmp_path, tmp_path, since=0) == {"SIGUSR2"}


def test_the_first_rank_that_ended_tells_the_signal(tmp_path: Path) -> None:
    note(tmp_path, 1, 1)
    note(tmp_path, 2, 75, "SIGCHLD")
    note(tmp_path, 0, 75, "SIGUSR2")
    note(tmp_path, 3, 75, "SIGTERM")  # torchrun's, for those that are left
    assert signals_of(tmp_path / "none", tmp_path, since=0) == {"SIGUSR2"}


def attempt(run: Path, began: float, ended: float | None, why: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    events: list[dict[str, object]] = [
        {"event": "began", "time": began, "step": 0, "world_size": 1, "job": "1", "restart": 0}
    ]
    if ended is not None:
        events.append({"event": "ended", "time": ended, "step": 3, "why": why})
    with (run / "attempts.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_what_the_ranks_agreed_on_counts_more_than_their_notes(tmp_path: Path) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    notes.mkdir()
    note(notes, 0, 75, "SIGUSR2")
    attempt(run / "pretrain", 100.0, 200.0, "SIGTERM")
    assert signals_of(run, notes, since=150.0) == {"SIGTERM"}
    assert signals_of(run, notes, since=201.0) == {"SIGUSR2"}  # of an earlier allocation
    attempt(run / "finetune", 200.0, 300.0, "SIGUSR2")
    assert signals_of(run, notes, since=150.0) == {"SIGUSR2"}
    attempt(run / "finetune", 300.0, 400.0, "DistributedError")
    note(notes, 0, 75, "SIGTERM")
    assert signals_of(run, notes, since=150.0) == {"SIGTERM"}  # the newest end was no wish
    attempt(run / "finetune", 500.0, None, "")
    assert signals_of(run, notes, since=150.0) == {"SIGTERM"}


# --- srun -----------------------------------------------------------------------------------------


def allocation(tasks: int = 16, cpus: str = "12") -> Allocation:
    return Allocation("77", "77", 0, ("n1", "n2"), tasks, cpus, os.getppid())


def test_srun_starts_one_task_for_each_rank() -> None:
    profile = load_profile("h100_x8", {"nodes": 2})
    assert srun_words(allocation(), profile) == [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--nodes=2",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--cpus-per-task=12",
        "--cpu-bind=cores",
    ]
    without = srun_words(allocation(cpus=""), profile)
    assert without == [w for w in srun_words(allocation(), profile) if "cpus-per" not in w]
    sockets = load_profile("h100_x8", {"nodes": 2, "cpu_binding": "sockets"})
    assert srun_words(allocation(), sockets)[-1] == "--cpu-bind=sockets"


def test_srun_starts_one_torchrun_for_each_node_in_a_container() -> None:
    mounts = ["/scratch:/scratch", "/data:/data"]
    profile = load_profile("container", {"container.mounts": mounts})
    assert srun_words(allocation(), profile) == [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=96",
        "--cpu-bind=none",
        "--container-image=images/bigsimclr.sqsh",
        "--container-mounts=/scratch:/scratch,/data:/data",
    ]


# --- in a batch script ----------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "14",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_RESTART_COUNT": "2",
}
SCONTROL = """\
case "$*" in
*hostnames*) echo n1; echo n2;;
*"show node"*) echo "NodeName=n1 NodeAddr=127.0.0.1";;
*"show job"*) echo "JobId=14 JobName=x JobState=$STATE Reason=$REASON Restarts=2 PreemptTime=None";;
esac"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job on two nodes whose ranks are what a test makes of `srun`."""
    for name, value in {**SLURM, "STATE": "RUNNING", "REASON": "None"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(batch, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(batch, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)
    return install(tmp_path, monkeypatch, scontrol=SCONTROL, scancel="true", srun="exit 0")


def test_a_job_knows_what_it_has(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_allocation() == Allocation("14", "14", 2, ("n1", "n2"), 4, "3", os.getppid())
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert own_allocation() == Allocation("14", "12_3", 2, ("n1", "n2"), 4, "3", os.getppid())
    for name in ("SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name)
    assert own_allocation() == Allocation("14", "12_3", 0, ("n1", "n2"), 2, "", os.getppid())


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_of_a_batch_script(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(RecipeError, match="srun: this is not the batch script of a Slurm job"):
        own_allocation()


def test_inside_of_a_task_that_is_not_the_first(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(RecipeError, match=r"slurm/train\.sbatch is one to start from"):
        own_allocation()


def run(folder: Path, **keys: object) -> int:
    """Go through a batch script, with this process's ways with signals put back after it."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    profile = Profile.model_validate({"time": "01:00:00", "signal_seconds": 60, **keys})
    try:
        return run_allocated(
            ["run", "x.yaml"], profile=profile, folder=folder / "slurm", watched=folder
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def events(folder: Path) -> list[tuple[object, ...]]:
    lines = RestartLog(folder / "slurm", "14").lines()
    return [(line["event"], line.get("code"), line.get("then")) for line in lines]


def rank(code: int, *signals: str) -> str:
    """Return an srun whose only rank leaves a note, which stands after --notes."""
    content = json.dumps({"code": code, "signals": signals})
    find = 'while [ "$1" != --notes ]; do shift; done'
    return f"{find}; echo '{content}' > \"$2/rank-0.json\"; exit {code}"


def srun_says(folder: Path, body: str) -> None:
    program = folder / "programs" / "srun"
    program.write_text(f'#!/bin/sh\necho "srun $*" >> "{folder}/calls"\n{body}\n')


def test_a_job_whose_ranks_are_done(slurm: Path, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert events(tmp_path) == [("began", None, None), ("ended", 0, "done")]
    started = slurm.read_text().splitlines()[-1]
    notes = tmp_path / "slurm" / "14-2"
    assert started == (
        "srun --kill-on-bad-exit=0 --wait=60 --nodes=2 --ntasks=4 --ntasks-per-node=2 "
        f"--cpus-per-task=3 --cpu-bind=cores {sys.executable} -m bigsimclr.launch.task "
        f"--notes {notes} run x.yaml"
    )
    assert notes.stat().st_mode & 0o777 == 0o700


def test_ranks_of_torchrun(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, f'env > "{tmp_path}/variables"')
    variables = {"NCCL_DEBUG": "WARN x\ny", "OMP_NUM_THREADS": "7"}
    assert run(tmp_path, launcher="torchrun", environment=variables) == 0
    assert (
        slurm.read_text()
        .splitlines()[-1]
        .endswith(f"-m bigsimclr.launch.task --notes {tmp_path}/slurm/14-2 --torchrun 2 run x.yaml")
    )
    given = (tmp_path / "variables").read_text().splitlines()
    assert {"NCCL_DEBUG=WARN x", "y", "OMP_NUM_THREADS=7", "PYTHONUNBUFFERED=1"} <= set(given)
    assert "MASTER_ADDR=127.0.0.1" in given
    assert not [line for line in given if line.startswith("TORCHELASTIC")]


def test_ranks_of_srun_find_a_meeting_point(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, f'env > "{tmp_path}/variables"')
    assert run(tmp_path) == 0
    given = (tmp_path / "variables").read_text().splitlines()
    assert {"MASTER_ADDR=127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE=True"} <= set(given)
    assert [line for line in given if line.startswith("MASTER_PORT=")]


def test_a_refusal_is_not_requeued(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, rank(3))
    assert run(tmp_path) == 3
    assert events(tmp_path)[-1] == ("ended", 3, "failed")
    assert "scontrol requeue" not in slurm.read_text()
    assert "show job" not in slurm.read_text()


def test_the_end_of_the_time_requeues_once(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, rank(75, "SIGUSR2"))
    assert run(tmp_path) == 75
    assert events(tmp_path)[-1] == ("ended", 75, "requeued")
    assert slurm.read_text().count("scontrol requeue 14\n") == 1


def test_a_wish_to_stop_is_kept(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, rank(75, "SIGTERM"))
    assert run(tmp_path) == 75
    assert events(tmp_path)[-1] == ("ended", 75, "stopped")
    assert "scontrol requeue" not in slurm.read_text()


def test_a_cancelled_job_is_left_alone(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE", "CANCELLED")
    srun_says(tmp_path, rank(75, "SIGTERM"))
    assert run(tmp_path) == 75
    assert events(tmp_path)[-1] == ("ended", 75, "ended by Slurm")
    assert "scontrol requeue" not in slurm.read_text()


def test_lost_ranks_without_progress_come_to_an_end(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, "kill -KILL $$")
    assert run(tmp_path, restarts_without_progress=1) == 137
    with pytest.raises(DistributedError, match="job 14 was restarted 1 times without progress; n"):
        run(tmp_path, restarts_without_progress=1)
    assert events(tmp_path)[-1] == ("ended", 137, "failed")
    with pytest.raises(DistributedError, match=r"1 times without progress \(0 finished, 0 exa"):
        run(tmp_path, restarts_without_progress=1)
    assert slurm.read_text().count("scontrol requeue 14\n") == 1
    assert slurm.read_text().count("srun ") == 2  # the third start began nothing


def test_a_job_that_cannot_be_requeued_says_so(slurm: Path, tmp_path: Path) -> None:
    srun_says(tmp_path, rank(75, "SIGUSR2"))
    scontrol = tmp_path / "programs" / "scontrol"
    body = SCONTROL.replace(
        "esac", "requeue*) echo 'scontrol: error: Access denied' >&2; exit 1;;\nesac"
    )
    scontrol.write_text(f"#!/bin/sh\n{body}\n")
    with pytest.raises(Stopped, match=r"saved its state and could not be requeued \(Slurm refuse"):
        run(tmp_path)


@pytest.mark.parametrize(("name", "then"), [("USR2", "requeued"), ("TERM", "stopped")])
def test_a_signal_to_the_script_alone_is_passed_on(
    slurm: Path, tmp_path: Path, name: str, then: str
) -> None:
    """The rank here waits for the SIGUSR2 by which srun hands a wish on."""
    wait = "trap 'heard=1' USR2; while [ -z \"$heard\" ]; do sleep 0.02; done"
    parent = f"kill -{name} {os.getpid()}"
    srun_says(tmp_path, f"{wait.partition(';')[0]}; {parent}; {wait}; {rank(75, 'SIGUSR2')}")
    assert run(tmp_path) == 75
    assert events(tmp_path)[-1] == ("ended", 75, then)


def test_a_controller_that_is_away_is_asked_again(slurm: Path, tmp_path: Path) -> None:
    away = "echo 'Unable to contact slurm controller' >&2; exit 1"
    once = f'if [ ! -e "{tmp_path}/asked" ]; then touch "{tmp_path}/asked"; {away}; fi'
    scontrol = tmp_path / "programs" / "scontrol"
    body = SCONTROL.replace('*"show job"*)', f'*"show job"*) {once};')
    scontrol.write_text(f'#!/bin/sh\necho "scontrol $*" >> "{slurm}"\n{body}\n')
    srun_says(tmp_path, rank(75, "SIGUSR2"))
    assert run(tmp_path) == 75
    assert slurm.read_text().count("scontrol requeue 14\n") == 1
    assert events(tmp_path)[-1] == ("ended", 75, "requeued")


def test_a_job_cancelled_meanwhile_is_not_requeued(slurm: Path, tmp_path: Path) -> None:
    """Between two questions somebody cancels it."""
    scontrol = tmp_path / "programs" / "scontrol"
    flip = f'if [ -e "{tmp_path}/asked" ]; then STATE=CANCELLED; fi; touch "{tmp_path}/asked"'
    body = SCONTROL.replace('*"show job"*)', f'*"show job"*) {flip};')
    scontrol.write_text(f'#!/bin/sh\necho "scontrol $*" >> "{slurm}"\n{body}\n')
    srun_says(tmp_path, rank(75, "SIGUSR2"))
    assert run(tmp_path) == 75
    assert "requeue" not in slurm.read_text()
    assert events(tmp_path)[-1] == ("ended", 75, "ended by Slurm")


def test_a_first_node_that_is_not_here(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, scontrol=SCONTROL.replace("127.0.0.1", "192.0.2.1"))
    with pytest.raises(DistributedError, match=r"the first node n1 has no address 192\.0\.2\.1"):
        run(tmp_path)
