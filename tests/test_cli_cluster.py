"""The commands for a cluster, as a user meets them; no Slurm is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bigsimclr.cli import app
from bigsimclr.launch.jobs import SubmittedJob, jobs_of, make_job_folder, note_jobs
from bigsimclr.recipe import load_recipe
from tests.launch.cluster import HOSTILE, answer, install
from tests.recipe.samples import PRETRAIN

PARTITIONS = "PartitionName=cpu Default=YES MaxNodes=UNLIMITED MaxTime=02:00:00 TotalNodes=2"
SBATCH = "echo 'Submitted batch job 41'"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(PRETRAIN)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(
        tmp_path,
        monkeypatch,
        scontrol=answer(PARTITIONS),
        squeue="true",
        sbatch=SBATCH,
        scancel="true",
        srun="exit 1",
    )


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def submit(*words: str) -> Result:
    return invoke("submit", "mine.yaml", "--on", "cpu", *words)


def refused(result: Result, code: int, text: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith(f"bigsimclr: error: {text}"), result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr[:-1].isprintable()


# --- submit ---------------------------------------------------------------------------------------


def test_submit(cluster: Path, tmp_path: Path) -> None:
    result = submit("schedule.epochs=5", "--set", "nodes=1")
    assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "mine"
    assert result.stdout == (
        f"job 41: 1 run\nsee: bigsimclr runs {run.parent}    bigsimclr logs -f {run}\n"
    )
    assert [job.number for job in jobs_of(run)] == ["41"]
    assert load_recipe(run / "slurm" / "recipe.yaml") == load_recipe(
        "mine.yaml", ["schedule.epochs=5"]
    )
    names = [line.split()[0] for line in cluster.read_text().splitlines()]
    assert names == ["scontrol", "squeue", "sbatch"]


def test_submit_a_sweep_and_a_pipeline(cluster: Path) -> None:
    assert submit("--array", "seed=1,2,3").stdout.startswith("job 41: 3 runs\n")
    result = invoke("submit", "digits", "--on", "slurm/cpu.yaml")
    assert result.exit_code == 0, result.output
    steps = [line.partition(": ")[2] for line in result.stdout.splitlines()[:-1]]
    recipe = load_recipe("digits")
    assert steps == [f"step {step.name}" for step in recipe.steps]  # type: ignore[union-attr]


def test_a_finished_pipeline_is_submitted_no_more(cluster: Path, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("stage: pipeline\nsteps: [{name: one, recipe: mine}]\n")
    (tmp_path / "runs" / "two" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "two" / "one" / "result.json").write_text("{}")
    result = invoke("submit", "two.yaml", "--on", "cpu")
    assert (result.exit_code, result.stdout) == (0, "runs/two: finished already\n")
    assert cluster.read_text() == ""


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--set", "time=03:00:00"], 2, "{slurm}/cpu.yaml:6: time: 03:00:00 is more than part"),
        (["--set", "partition=gpu"], 2, "{slurm}/cpu.yaml:"),
        (["--set", "nodes=8"], 2, "{slurm}/cpu.yaml:3: nodes: 8 are more than partition 'cpu'"),
        (["--set", "partition=a b"], 2, "override partition: 'a b' is refused"),
        (["--after", "nowhere"], 2, "--after nowhere: no job works on it, and it is not finished"),
        (["seeed=1"], 2, "override seeed: unknown key; did you mean 'seed'?"),
        (["--out", "a;b"], 2, "--out: "),
        (["--array", "seed=1,1"], 2, "--array: two combinations are the same"),
    ],
)
def test_what_submit_refuses(
    cluster: Path, tmp_path: Path, words: list[str], code: int, text: str
) -> None:
    from tests.architecture.tree import ROOT

    refused(submit(*words), code, text.replace("{slurm}", str(ROOT / "slurm")))
    assert not (tmp_path / "runs").exists()
    assert "sbatch" not in cluster.read_text()


def test_no_slurm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    make_job_folder(tmp_path / "run")
    note_jobs(tmp_path / "run", [SubmittedJob("7", "", "log", 1.0, "cpu")])
    for words in (
        ["submit", "mine.yaml", "--on", "cpu"],
        ["cancel", "12"],
        ["cancel", "run"],
        ["logs", "-f", "run"],
        ["doctor", "--slurm"],
    ):
        result = invoke(*words)
        refused(result, 6, "Slurm's ")
        assert " is not here; run this on a login node of the cluster" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(HOSTILE[::10], id="some"),
        pytest.param(HOSTILE, id="all", marks=pytest.mark.slow),
    ],
)
def test_hostile_words_end_in_one_line(
    cluster: Path, tmp_path: Path, texts: tuple[str, ...]
) -> None:
    for text in texts:
        if "\0" in text:  # no command line can hold one
            continue
        for words in (["--out", f"runs/{text}x", "--dry-run"], ["--after", f"runs/{text}"]):
            result = submit(*words)
            assert result.exit_code in {0, 2}, (text, result.output)
            assert "unexpected" not in result.stderr
            assert result.stderr.count("\n") <= 1
        result = invoke("submit", f"a{text}", "--on", "cpu")
        assert result.exit_code == 2, (text, result.output)
    assert not list(tmp_path.rglob("canary"))
    assert "sbatch" not in cluster.read_text()


# --- the others -----------------------------------------------------------------------------------


def jobs(folder: Path, *numbers: str) -> None:
    make_job_folder(folder)
    log = folder / "slurm" / "log"
    note_jobs(folder, [SubmittedJob(number, "", str(log), 1.0, "cpu") for number in numbers])


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue=answer("7|RUNNING|None"))
    assert invoke("runs", ".").stdout == ".: no runs\n"
    refused(invoke("runs"), 2, "runs is no folder; name one that holds runs")
    jobs(tmp_path / "runs" / "a", "7")
    assert invoke("runs").stdout.splitlines() == [
        "run  job  state    step  loss  left  restarts",
        "a    7    running  -     -     -     0",
    ]
    facts = json.loads(invoke("runs", "--json").stdout)
    assert facts["note"] is None
    assert facts["runs"] == [
        {
            "run": "a",
            "job": "7",
            "state": "running",
            "done": None,
            "total": None,
            "loss": None,
            "seconds_left": None,
            "restarts": 0,
        }
    ]


def test_runs_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs(tmp_path / "runs" / "a", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = invoke("runs")
    assert result.exit_code == 0
    assert "\n\nstates of jobs are not known: Slurm's squeue is not here" in result.stdout
    assert json.loads(invoke("runs", "--json").stdout)["note"].startswith("Slurm's squeue is not")


def test_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = "7|RUNNING|None\n9_0|PENDING|None\n9_1|PENDING|None"
    calls = install(tmp_path, monkeypatch, squeue=answer(queue), scancel="true")
    jobs(tmp_path / "a", "6", "7")
    jobs(tmp_path / "b", "5")
    result = invoke("cancel", "a", "b", "9")
    assert result.stdout == "a: cancelled 7\nb: no job waits or runs\n9: cancelled 9_0, 9_1\n"
    assert [line for line in calls.read_text().splitlines() if "scancel" in line] == [
        "scancel 7",
        "scancel 9_0 9_1",
    ]
    refused(invoke("cancel", "nowhere"), 2, "nowhere has no jobs")


def test_logs(cluster: Path, tmp_path: Path) -> None:
    jobs(tmp_path / "a", "7")
    (tmp_path / "a" / "slurm" / "log").write_text("one\ntwo")
    assert invoke("logs", "a").stdout == "one\ntwo"
    assert invoke("logs", "-f", "a").stdout == "one\ntwo"  # its job has left the queue
    refused(invoke("logs", "nowhere"), 2, "nowhere is no folder")
    (tmp_path / "b").mkdir()
    refused(invoke("logs", "b"), 2, "b has no jobs")


def test_srun_outside_of_a_job() -> None:
    text = "srun: this is not the batch script of a Slurm job"
    refused(invoke("srun", "mine.yaml", "--out", "run"), 2, text)


def test_doctor_holds_a_profile_against_the_cluster(cluster: Path) -> None:
    result = invoke("doctor", "--slurm", "--on", "cpu")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("profile      cpu fits: 2 ranks; asked to")
    result = invoke("doctor", "--slurm", "--on", "h100_x64")
    assert result.exit_code == 2
    assert "time: 24:00:00 is more than partition 'cpu' gives (02:00:00)" in result.stdout
    refused(invoke("doctor", "--on", "cpu"), 2, "doctor: --on goes with --slurm")


@pytest.mark.parametrize(
    "words",
    [
        ["submit", "--help"],
        ["srun", "--help"],
        ["runs", "--help"],
        ["submit", "digits/1_pretrain", "--on", "cpu", "--dry-run"],
        ["submit", "digits", "--on", "h100_x8", "--dry-run"],
        ["runs", "."],
    ],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom bigsimclr.cli import main\n"
        f"sys.argv[1:] = {words!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        'heavy = {"torch", "sklearn", "scipy", "matplotlib", "pandas", "PIL", "rich", "jinja2"}\n'
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
