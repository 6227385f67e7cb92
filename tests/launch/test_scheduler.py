"""Slurm's answers, as its own commands print them, and what is made of its silence."""

from datetime import datetime
from pathlib import Path

import pytest

from bigsimclr.errors import DistributedError
from bigsimclr.launch import scheduler
from bigsimclr.launch.scheduler import JobFacts, QueuedJob, complaint, minutes
from tests.launch.cluster import answer, install, refusal

# scontrol --oneliner show job, of Slurm 22.05 and newer, in one line
JOB = (
    "JobId=4711 JobName=digits-pretrain UserId=root(0) GroupId=root(0) MCS_label=N/A "
    "Priority=4294901757 Nice=0 Account=(null) QOS=normal JobState=RUNNING Reason=None "
    "Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:12 "
    "TimeLimit=00:02:00 SubmitTime=2026-05-04T10:00:00 EligibleTime=2026-05-04T10:02:01 "
    "AccrueTime=2026-05-04T10:02:01 StartTime=2026-05-04T10:03:00 EndTime=2026-05-04T10:05:00 "
    "Deadline=N/A PreemptEligibleTime=2026-05-04T10:03:00 PreemptTime=None SuspendTime=None "
    "SecsPreSuspend=0 LastSchedEval=2026-05-04T10:03:00 Scheduler=Main Partition=low "
    "AllocNode:Sid=login:1234 ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 "
    "NumNodes=2 NumCPUs=4 NumTasks=2 CPUs/Task=2 ReqB:S:C:T=0:0:*:* TRES=cpu=4,mem=2G,node=2 "
    "Socks/Node=* NtasksPerN:B:S:C=1:0:*:* CoreSpec=* MinCPUsNode=2 MinMemoryNode=0 "
    "MinTmpDiskNode=0 Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 "
    "Licenses=(null) Network=(null) Command=/a b/submission_file.sh WorkDir=/srv/x y "
    "StdErr=/a b/slurm/4711_0_log.out StdIn=/dev/null StdOut=/a b/slurm/4711_0_log.out Power="
)
ENDS = datetime(2026, 5, 4, 10, 5).timestamp()  # noqa: DTZ001 - Slurm tells local time


def changed(**fields: str) -> str:
    text = JOB
    for name, value in fields.items():
        before = next(word for word in JOB.split() if word.startswith(f"{name}="))
        text = text.replace(f" {before} ", f" {name}={value} ")
    return text


def facts_of(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFacts | None:
    install(tmp_path, monkeypatch, scontrol=answer(text))
    return scheduler.job_facts("4711")


# --- one job --------------------------------------------------------------------------------------


def test_a_job_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(tmp_path, monkeypatch, scontrol=answer(JOB))
    assert scheduler.job_facts("4711") == JobFacts("RUNNING", "None", 2, False, ENDS)
    assert calls.read_text() == "scontrol --oneliner show job 4711\n"


def test_a_job_that_is_preempted_or_has_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = changed(PreemptTime="2026-05-04T10:04:00")
    assert facts_of(text, tmp_path, monkeypatch) == JobFacts("RUNNING", "None", 2, True, ENDS)
    text = changed(EndTime="Unknown", JobState="PENDING", Reason="BeginTime", Restarts="3")
    assert facts_of(text, tmp_path, monkeypatch) == JobFacts("PENDING", "BeginTime", 3, False, None)


def test_a_reason_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher partitions"
    found = facts_of(changed(Reason=reason), tmp_path, monkeypatch)
    assert found is not None
    assert (found.reason, found.restarts) == (reason, 2)


def test_a_path_cannot_speak_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/runs/x Restarts=9 JobState=TIMEOUT Reason=TimeLimit EndTime=Unknown PreemptTime=now"
    text = JOB.replace("/a b/", f"{path}/")
    assert facts_of(text, tmp_path, monkeypatch) == JobFacts("RUNNING", "None", 2, False, ENDS)


def test_a_job_that_slurm_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal("slurm_load_jobs", "Invalid job id specified")
    install(tmp_path, monkeypatch, scontrol=text)
    assert scheduler.job_facts("4711") is None


def test_other_refusals_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal("slurm_load_jobs", "Unable to contact slurm controller (connect failure)")
    install(tmp_path, monkeypatch, scontrol=text)
    with pytest.raises(DistributedError, match=r"Slurm refuses: .*Unable to contact slurm contro"):
        scheduler.job_facts("4711")


def test_an_empty_answer_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, scontrol="true", squeue="true")
    assert scheduler.job_facts("4711") is None
    assert scheduler.node_address("n1") == "n1"
    assert scheduler.queue() == {}
    assert scheduler.partitions() == {}
    assert scheduler.settings() == {}
    assert scheduler.node_names("n[1-2]") == []


# --- the queue ------------------------------------------------------------------------------------

QUEUE = """\
12_3|RUNNING|None|1-02:03:04|UNLIMITED
12_4|PENDING|JobArrayTaskLimit|0:00|1:00:00
13|PENDING|Dependency|0:00|30:00
14|COMPLETING|None|INVALID|0:07
  15|PENDING|Nodes required for job are DOWN, DRAINED|0:00|NOT_SET
"""


def test_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(tmp_path, monkeypatch, squeue=answer(QUEUE))
    reason = "Nodes required for job are DOWN, DRAINED"
    assert scheduler.queue() == {
        "12_3": QueuedJob("RUNNING", "None", 93_784.0, None),
        "12_4": QueuedJob("PENDING", "JobArrayTaskLimit", 0.0, 3_600.0),
        "13": QueuedJob("PENDING", "Dependency", 0.0, 1_800.0),
        "14": QueuedJob("COMPLETING", "None", 0.0, 7.0),
        "15": QueuedJob("PENDING", reason, 0.0, None),
    }
    assert calls.read_text() == "squeue --noheader --me --array --format=%i|%T|%r|%M|%L\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNLIMITED", None),
        ("NONE", None),
        ("", None),
        ("00:00:30", 0),
        ("30:00", 30),
        ("01:00:00", 60),
        ("1-00:00:00", 1_440),
        ("1-02:03:04", 1_563),
        ("365-00:00:00", 525_600),
    ],
)
def test_limits(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


# --- the cluster ----------------------------------------------------------------------------------

PARTITIONS = """\
PartitionName=low AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES \
QoS=N/A DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=20 Hidden=NO \
MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-3] \
PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE \
PreemptMode=REQUEUE State=UP TotalCPUs=12 TotalNodes=3 SelectTypeParameters=NONE \
JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED \
TRES=cpu=12,mem=6000M,node=3,billing=12
PartitionName=high AllowGroups=ALL Default=NO GraceTime=0 MaxNodes=2 MaxTime=1-00:00:00 \
PreemptMode=OFF State=UP TotalNodes=3

"""
CONFIG = """\
Configuration data as of 2026-05-04T10:00:00
AccountingStorageType   = (null)
ClusterName             = lab
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptParameters       = send_user_signal,reorder_count=2
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at n1 is UP
"""


def test_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, scontrol=answer(PARTITIONS))
    found = scheduler.partitions()
    assert list(found) == ["low", "high"]
    low, high = found["low"], found["high"]
    assert (low["Default"], low["MaxTime"], low["GraceTime"]) == ("YES", "UNLIMITED", "20")
    assert (low["TotalNodes"], low["TRES"]) == ("3", "cpu=12,mem=6000M,node=3,billing=12")
    assert (high["MaxNodes"], high["MaxTime"], high["State"]) == ("2", "1-00:00:00", "UP")


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(tmp_path, monkeypatch, scontrol=answer(CONFIG))
    assert scheduler.settings() == {
        "AccountingStorageType": "(null)",
        "ClusterName": "lab",
        "KillWait": "30 sec",
        "PreemptMode": "REQUEUE",
        "PreemptParameters": "send_user_signal,reorder_count=2",
        "SLURM_VERSION": "22.05.8",
    }
    assert calls.read_text() == "scontrol show config\n"


def test_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = "NodeName=n1 Arch=x86_64 CoresPerSocket=2 NodeAddr=127.0.0.2 NodeHostName=n1 Version=22"
    script = f'case "$*" in *hostnames*) printf "n1\\nn2\\n";; *) {answer(node)}\n;; esac'
    calls = install(tmp_path, monkeypatch, scontrol=script)
    assert scheduler.node_address("n1") == "127.0.0.2"
    assert scheduler.node_names("n[1-2]") == ["n1", "n2"]
    assert calls.read_text().splitlines() == [
        "scontrol --oneliner show node n1",
        "scontrol show hostnames n[1-2]",
    ]


# --- requeue, cancel ------------------------------------------------------------------------------

CONTACT = "slurm_update error: Unable to contact slurm controller (connect failure)"


def test_requeue_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(tmp_path, monkeypatch, scontrol=f"echo '{CONTACT}' >&2; exit 1")
    with pytest.raises(DistributedError, match="Slurm refuses: slurm_update error: Unable to con"):
        scheduler.requeue("12")
    assert calls.read_text() == "scontrol requeue 12\n"


def test_a_job_that_waits_already_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo 'Job is pending execution for job 12' >&2; exit 1"
    calls = install(tmp_path, monkeypatch, scontrol=script)
    scheduler.requeue("12")
    assert calls.read_text() == "scontrol requeue 12\n"


def test_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(tmp_path, monkeypatch, scancel="true")
    scheduler.cancel(["12", "13_1"])
    assert calls.read_text() == "scancel 12 13_1\n"


# --- no answer, and words of refusal --------------------------------------------------------------


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask, program in ((scheduler.queue, "squeue"), (scheduler.settings, "scontrol")):
        with pytest.raises(DistributedError) as caught:
            ask()
        assert str(caught.value) == (
            f"Slurm's {program} is not here; run this on a login node of the cluster, or train on "
            "this machine with: bigsimclr run"
        )
        assert caught.value.exit_code == 6


def test_a_program_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue="true")
    program = tmp_path / "programs" / "squeue"
    program.write_bytes(b"\x7fELF, but not quite")
    with pytest.raises(DistributedError, match="squeue cannot be run: Exec format error"):
        scheduler.queue()


def test_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ANSWER_SECONDS", 0.2)
    install(tmp_path, monkeypatch, squeue="exec sleep 60")
    with pytest.raises(DistributedError) as caught:
        scheduler.queue()
    assert str(caught.value) == "Slurm does not answer within 0.2 s (squeue); try again later"


def test_a_refusal_is_one_printable_line() -> None:
    text = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    )
    assert complaint(text, "sbatch") == (
        "invalid partition specified: x; Batch job submission failed"
    )
    assert complaint("sbatch: error: a\nsbatch: error: a\n\n", "sbatch") == "a"
    assert complaint("", "sbatch") == "sbatch failed without a word"
    assert complaint("a\x1b[31mred\x07", "sbatch") == "a\\x1b[31mred\\x07"
    assert len(complaint("x" * 1000, "sbatch")) == 400


def test_bytes_that_are_no_text_do_not_hurt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, scontrol=r"printf 'scontrol: error: \377\n' >&2; exit 1")
    with pytest.raises(DistributedError, match="Slurm refuses: \ufffd"):
        scheduler.settings()
