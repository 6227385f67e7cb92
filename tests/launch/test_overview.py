"""Runs and their jobs at a glance, logs, cancelling; and what is said of a cluster."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bigsimclr.errors import DistributedError, RecipeError
from bigsimclr.launch import overview
from bigsimclr.launch.checkup import describe_cluster
from bigsimclr.launch.jobs import SubmittedJob, make_job_folder, note_jobs
from bigsimclr.launch.overview import (
    RunLine,
    active_jobs,
    list_runs,
    overview_text,
    read_log,
)
from bigsimclr.launch.restarts import RestartLog
from tests.launch.cluster import answer, install

QUEUE = """\
21|RUNNING|None
31|PENDING|Dependency
41_1|PENDING|None
"""


def records(steps: Sequence[int], times: Sequence[float], loss: float = 2.5) -> str:
    lines = []
    for step, moment in zip(steps, times, strict=True):
        record = {"examples": 64 * step, "step": step, "time": moment}
        lines.append(json.dumps(record | {"values": {"train/loss": loss / step}}) + "\n")
    return "".join(lines)


def run(folder: Path, *, steps: int | None = 1000, metrics: str = "", done: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("stage: pretrain\n")
    if steps is not None:
        (folder / "plan.json").write_text(json.dumps({"steps": steps}))
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    if done:
        (folder / "result.json").write_text("{}")
    return folder


def jobs(folder: Path, *numbers: str) -> None:
    make_job_folder(folder)
    logs = [str(folder / "slurm" / f"{number}_0_log.out") for number in numbers]
    noted = [SubmittedJob(n, "", log, 1.0, "cpu") for n, log in zip(numbers, logs, strict=True)]
    note_jobs(folder, noted)


def restarts(folder: Path, number: str, then: str, count: int, code: int = 75) -> None:
    log = RestartLog(folder / "slurm", number)
    for restart in range(count + 1):
        log.begin(restart, str(restart), limit=3)
        log.end(restart, code, then if restart == count else "requeued")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    run(folder / "alone", metrics=records([10, 20], [0.0, 5.0]), done=True)
    # Ten steps in five seconds, and a pause between two jobs: 1000 - 30 steps are left.
    training = run(folder / "b" / "training", metrics=records([10, 20, 30], [0.0, 5.0, 10.0]))
    with (training / "metrics.jsonl").open("a") as file:
        file.write('{"examples": 9, "st')
    jobs(training, "20", "21")
    restarts(training, "20", "failed", 2, code=3)
    restarts(training, "21", "preempted", 1)
    failed = run(folder / "failed", steps=None)
    jobs(failed, "22")
    restarts(failed, "22", "failed", 0, code=5)
    pipeline = folder / "pipeline"
    run(pipeline / "pretrain", metrics=records([500], [1.0]), done=True)
    run(pipeline / "finetune" / "seed=1", metrics=records([5], [9.0], loss=1.0))
    parts = [["pretrain"], ["finetune/seed=1", "finetune/seed=2"]]
    steps = [{"runs": [{"path": path} for path in paths]} for paths in parts]
    (pipeline / "pipeline.json").write_text(json.dumps({"steps": steps}))
    jobs(pipeline, "30", "31")
    jobs(folder / "submitted", "41_1")
    (folder / "not a run").mkdir()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "recipe.yaml").write_text("")
    (folder / "link").symlink_to(folder / "alone")
    return folder


EXPECTED = [
    RunLine("alone", "", "finished", 20, 1000, 0.125, None, 0),
    RunLine("b/training", "21", "running", 30, 1000, 2.5 / 30, 485.0, 3),
    RunLine("failed", "22", "failed (exit 5)", None, None, None, None, 0),
    RunLine("pipeline", "31", "pending (Dependency)", 1, 3, 0.2, None, 0),
    RunLine("submitted", "41_1", "pending", None, None, None, None, 0),
]


def test_all_kinds_of_runs(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue=answer(QUEUE))
    assert list_runs(runs) == (EXPECTED, None)
    assert list_runs(runs / "b") == ([_named(EXPECTED[1], "training")], None)
    single = runs / "b" / "training"
    assert list_runs(single) == ([_named(EXPECTED[1], str(single))], None)
    assert list_runs(runs / "not a run") == ([], None)


def _named(line: RunLine, name: str) -> RunLine:
    return RunLine(**{**vars(line), "run": name})


def test_when_no_job_is_left(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue="true")
    lines, _ = list_runs(runs)
    assert [(line.job, line.state) for line in lines] == [
        ("", "finished"),
        ("21", "preempted"),
        ("22", "failed (exit 5)"),
        ("31", "not running"),
        ("41_1", "not running"),
    ]


def test_without_slurm_the_rest_is_told(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lines, note = list_runs(runs)
    assert note is not None
    assert note.startswith("Slurm's squeue is not here")
    assert [line.done for line in lines] == [line.done for line in EXPECTED]
    assert list_runs(runs / "alone")[1] is None  # nobody asked for a job


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere is no folder; name one that holds runs"):
        list_runs(tmp_path / "nowhere")


def test_the_table(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue=answer(QUEUE))
    assert overview_text(list_runs(runs)[0]).splitlines() == [
        "run         job   state                 step      loss     left     restarts",
        "alone       -     finished              20/1,000  0.125    -        0",
        "b/training  21    running               30/1,000  0.08333  0:08:05  3",
        "failed      22    failed (exit 5)       -         -        -        0",
        "pipeline    31    pending (Dependency)  1/3       0.2      -        0",
        "submitted   41_1  pending               -         -        -        0",
    ]


def test_the_facts_as_json() -> None:
    assert EXPECTED[0].as_facts() == {
        "run": "alone",
        "job": None,
        "state": "finished",
        "done": 20,
        "total": 1000,
        "loss": 0.125,
        "seconds_left": None,
        "restarts": 0,
    }


@pytest.mark.parametrize(
    ("steps", "times", "left"),
    [
        ([10], [0.0], None),
        ([10, 20], [0.0, 5.0], 490.0),
        ([10, 20, 30, 40], [0.0, 5.0, 4000.0, 4005.0], 480.0),  # a pause between two jobs
        ([10, 10], [0.0, 5.0], None),
        ([20, 10, 20], [0.0, 2.0, 4.0], 196.0),  # continued from an earlier step
        ([500, 1000], [0.0, 5.0], 0.0),
    ],
)
def test_the_time_that_is_left(
    tmp_path: Path, steps: list[int], times: list[float], left: float | None
) -> None:
    run(tmp_path / "runs" / "a", metrics=records(steps, times))
    (line,) = list_runs(tmp_path / "runs")[0]
    assert line.seconds_left == left


def test_only_recent_records_say_how_fast_a_run_is(tmp_path: Path) -> None:
    slow = [100.0 * number for number in range(30)]
    fast = [slow[-1] + 1.0 + number for number in range(20)]
    steps = list(range(1, 51))
    run(tmp_path / "runs" / "a", metrics=records(steps, [*slow, *fast]))
    (line,) = list_runs(tmp_path / "runs")[0]
    assert line.seconds_left == 950.0


def test_damaged_files_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue="true")
    folder = run(tmp_path / "runs" / "a\x1b[31m", metrics="null\n[]\n{}\n")
    (folder / "plan.json").write_text('{"steps": "many"}')
    (folder / "pipeline.json").write_text('{"steps": ')
    jobs(folder, "5")
    (folder / "slurm" / "5.jsonl").write_text("null\n")
    lines, _ = list_runs(tmp_path / "runs")
    assert [(line.state, line.done, line.total) for line in lines] == [("not running", 0, 1)]
    assert overview_text(lines).splitlines()[1].startswith("a\\x1b[31m  5")


# --- logs -----------------------------------------------------------------------------------------


def log_of(folder: Path, number: str) -> Path:
    return folder / "slurm" / f"{number}_0_log.out"


def test_the_newest_log_that_is_there(tmp_path: Path) -> None:
    jobs(tmp_path, "1", "2", "3")
    log_of(tmp_path, "1").write_text("first\n")
    log_of(tmp_path, "2").write_text("second\n")
    assert "".join(read_log(tmp_path, follow=False)) == "second\n"
    log_of(tmp_path, "2").unlink()
    log_of(tmp_path, "1").unlink()
    assert list(read_log(tmp_path, follow=False)) == []


def test_a_run_without_jobs_has_no_log(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no jobs; its progress is in .*metrics\.jsonl"):
        list(read_log(tmp_path, follow=False))
    with pytest.raises(RecipeError, match=r"nowhere is no folder; bigsimclr runs lists the runs"):
        list(read_log(tmp_path / "nowhere", follow=False))


def test_signs_of_several_bytes_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_LOG_BYTES", 5)
    jobs(tmp_path, "1")
    text = "loss \u2588\u2588\u2588 \U0001f600 done, caf\u00e9\n"
    log_of(tmp_path, "1").write_text(text, encoding="utf-8")
    assert "".join(read_log(tmp_path, follow=False)) == text
    log_of(tmp_path, "1").write_bytes(b"broken \xff\xe2\x96")
    assert "".join(read_log(tmp_path, follow=False)) == "broken \ufffd\ufffd"


def test_a_log_is_followed_until_the_job_has_left_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the queue finds more in the log; the third finds the job gone."""
    monkeypatch.setattr(overview, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(overview, "_QUEUE_SECONDS", -1.0)
    jobs(tmp_path, "7")
    log = log_of(tmp_path, "7")
    calls = tmp_path / "calls"
    body = (
        f'looks=$(grep -c squeue "{calls}")\n'
        f'if [ "$looks" -le 3 ]; then echo "look $looks" >> "{log}"; fi\n'
        'if [ "$looks" -lt 3 ]; then echo "7|RUNNING|None"; fi'
    )
    install(tmp_path, monkeypatch, squeue=body)
    text = "".join(read_log(tmp_path, follow=True))
    assert text == "look 1\nlook 2\nlook 3\n"


def test_a_job_that_waits_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(overview, "_QUEUE_SECONDS", -1.0)
    jobs(tmp_path, "7")
    calls = install(
        tmp_path,
        monkeypatch,
        squeue=f'if [ $(grep -c squeue "{tmp_path}/calls") -lt 4 ]; then echo "7|PENDING|None"; fi',
    )
    assert list(read_log(tmp_path, follow=True)) == []
    assert calls.read_text().count("squeue") == 4


# --- which jobs to cancel -------------------------------------------------------------------------


def test_jobs_of_a_run_or_a_number(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = f"{QUEUE}41_2|RUNNING|None\n410|RUNNING|None"
    install(tmp_path, monkeypatch, squeue=answer(queue))
    assert active_jobs(runs / "b" / "training") == ["21"]
    assert active_jobs(runs / "failed") == []
    assert active_jobs(Path("41")) == ["41_1", "41_2"]
    assert active_jobs(Path("41_2")) == ["41_2"]
    assert active_jobs(Path("4")) == []
    with pytest.raises(RecipeError, match="has no jobs; bigsimclr runs lists those that have"):
        active_jobs(runs / "alone")


# --- the cluster ----------------------------------------------------------------------------------

CONFIG = """\
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = lab
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptParameters       = send_user_signal
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 22.05.8
TaskPlugin              = task/affinity,task/cgroup
"""
PARTITIONS = """\
PartitionName=low Default=YES GraceTime=20 MaxTime=UNLIMITED PreemptMode=REQUEUE State=UP \
TotalNodes=3
PartitionName=high Default=NO GraceTime=0 MaxNodes=2 MaxTime=02:00:00 PreemptMode=OFF State=DOWN \
TotalNodes=2
"""


def describe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, on: str | None = None
) -> tuple[dict[str, str], list[str], bool]:
    script = (
        f'case "$*" in *config*) {answer(config)}\n;; *partition*) {answer(PARTITIONS)}\n;; esac'
    )
    install(tmp_path, monkeypatch, scontrol=script)
    text, fits = describe_cluster(tmp_path, on)
    rows = [line.split("  ", 1) for line in text.splitlines()]
    pairs = [(topic, value.strip()) for topic, value in rows]
    return dict(pairs), [value for topic, value in pairs if topic == "partition"], fits


def test_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, partitions, fits = describe(tmp_path, monkeypatch, CONFIG)
    assert fits
    assert partitions == [
        "low (default): up, 3 nodes, at most UNLIMITED, preemption requeue, 20 s of grace",
        "high: down, 2 nodes, at most 02:00:00, preemption off, 0 s of grace",
    ]
    assert facts["slurm"] == "22.05.8, cluster lab"
    assert facts["preemption"] == (
        "partition_prio, requeue; a run gets SIGUSR2 and SIGTERM, and saves"
    )
    assert facts["kill wait"] == "30 sec between SIGTERM and the end"
    assert facts["requeue"].startswith("allowed; ")
    assert facts["cpu binding"] == "task/affinity,task/cgroup"
    assert facts["accounting"] == "accounting_storage/slurmdbd"
    assert facts["files"].startswith(f"{tmp_path} on ")
    assert facts["files"].endswith("files can be locked")
    assert "profile" not in facts


def test_another_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = (
        CONFIG.replace("send_user_signal", "reorder_count=2")
        .replace("PreemptMode             = REQUEUE", "PreemptMode             = GANG,CANCEL")
        .replace("30 sec", "5 sec")
        .replace("JobRequeue              = 1", "JobRequeue              = 0")
        .replace("task/affinity,task/cgroup", "task/none")
        .replace("accounting_storage/slurmdbd", "(null)")
    )
    facts, _, _ = describe(tmp_path, monkeypatch, config)
    assert facts["preemption"] == (
        "partition_prio, gang,cancel; a run gets SIGTERM, and saves; where it cancels, "
        "submit again by hand"
    )
    assert facts["kill wait"] == (
        "5 sec between SIGTERM and the end: short for a checkpoint of a large network"
    )
    assert facts["requeue"].startswith("off by default, asked for by our jobs; ")
    assert facts["cpu binding"] == "task/none: cpu_binding has no effect here"
    assert facts["accounting"] == "none, and not needed"


@pytest.mark.parametrize("kind", ["(null)", "preempt/none"])
def test_a_cluster_without_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = CONFIG.replace("preempt/partition_prio", kind)
    assert describe(tmp_path, monkeypatch, config)[0]["preemption"] == "none"


def test_a_cluster_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, _, fits = describe(tmp_path, monkeypatch, "")
    assert fits
    assert (facts["slurm"], facts["preemption"]) == ("?, cluster ?", "none")


def test_a_profile_against_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, _, fits = describe(tmp_path, monkeypatch, CONFIG, "slurm/cpu.yaml")
    assert fits
    assert facts["profile"] == (
        "slurm/cpu.yaml fits: 2 ranks; asked to save 120 s before 1 h are over, up to a minute "
        "early"
    )
    file = tmp_path / "mine.yaml"
    file.write_text("time: 03:00:00\npartition: high\n")
    facts, _, fits = describe(tmp_path, monkeypatch, CONFIG, str(file))
    assert not fits
    assert facts["profile"] == (
        f"{file}:1: time: 03:00:00 is more than partition 'high' gives (02:00:00)"
    )


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DistributedError, match="Slurm's scontrol is not here"):
        describe_cluster(tmp_path, None)
