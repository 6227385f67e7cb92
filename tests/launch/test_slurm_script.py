"""The batch script to the letter, and what is submitted with it."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest

from bigsimclr.errors import DistributedError, RecipeError
from bigsimclr.launch.jobs import jobs_of
from bigsimclr.launch.profile import Profile, load_profile
from bigsimclr.launch.slurm import become, script, submit
from bigsimclr.launch.submission import Submission, plan_submission, write_files
from tests.launch.cluster import install, refusal
from tests.launch.test_submission import pipeline as pipeline  # noqa: PLC0414 - a fixture
from tests.recipe.samples import PRETRAIN

FULL = {
    "nodes": 2,
    "gpus_per_node": 4,
    "gpu_type": "h100",
    "cpus_per_rank": 6,
    "memory_gb": 200,
    "exclusive": True,
    "time": "1-02:00:01",
    "partition": "gpu,gpu2",
    "account": "vision",
    "qos": "high",
    "reservation": "maintenance",
    "constraint": "(a100|h100)&ib",
    "exclude": "node[17,23]",
    "comment": "first=try",
    "signal_seconds": 300,
    "modules": ["cuda/12.4", "gcc"],
    "python": "/usr/venv/bin/python",
}
SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --comment=first=try
#SBATCH --constraint='(a100|h100)&ib'
#SBATCH --cpus-per-task=6
#SBATCH --exclude='node[17,23]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=h100:4
#SBATCH --job-name=first-try
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=200GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='RUN/slurm/%j_0_log.out'
#SBATCH --partition=gpu,gpu2
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=maintenance
#SBATCH --signal=USR2@300
#SBATCH --time=1561

# setup
module load cuda/12.4
module load gcc

# command
export SUBMITIT_EXECUTOR=slurm
exec /usr/venv/bin/python -u -m submitit.core._submit 'RUN/slurm'
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(PRETRAIN)
    return str(file)


def lines_of(planned: Submission, *needs: str, **keys: object) -> set[str]:
    profile = Profile.model_validate_json(json.dumps({"time": "01:00:00", **keys}))
    return set(script(planned.jobs[0], profile, dependencies=needs).splitlines())


def test_a_script_to_the_letter(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first try"
    (job,) = plan_submission(recipe, [], out=run).jobs
    profile = Profile.model_validate_json(json.dumps(FULL))
    assert script(job, profile, dependencies=()) == SCRIPT.replace("RUN", str(run))
    assert not run.exists()


def test_a_script_is_good_bash(recipe: str, tmp_path: Path) -> None:
    (job,) = plan_submission(recipe, [], out=tmp_path / "a b").jobs
    text = script(job, Profile.model_validate_json(json.dumps(FULL)), dependencies=())
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_what_a_bare_profile_does_not_say(recipe: str, tmp_path: Path) -> None:
    made = lines_of(plan_submission(recipe, [], out=tmp_path / "run"))
    keys = {line.split("--")[1].partition("=")[0] for line in made if line.startswith("#SBATCH")}
    assert keys == {
        "cpus-per-task",
        "job-name",
        "kill-on-invalid-dep",
        "nodes",
        "ntasks-per-node",
        "open-mode",
        "output",
        "requeue",
        "signal",
        "time",
    }
    assert f"exec {sys.executable} -u -m submitit.core._submit {tmp_path}/run/slurm" in made
    assert not [line for line in made if line.startswith(("module", "srun"))]


def test_a_job_that_may_not_be_requeued(recipe: str, tmp_path: Path) -> None:
    made = lines_of(plan_submission(recipe, [], out=tmp_path / "run"), requeue=False)
    assert "#SBATCH --no-requeue" in made
    assert "#SBATCH --requeue" not in made


def test_an_array(recipe: str, tmp_path: Path) -> None:
    planned = plan_submission(recipe, [], out=tmp_path / "sweep", sweep=["seed=1,2,3"])
    made = lines_of(planned)
    assert "#SBATCH --array=0-2%3" in made
    assert f"#SBATCH --output={tmp_path}/sweep/slurm/%A_%a_0_log.out" in made
    assert f"#SBATCH --job-name={tmp_path.name}-sweep" in made
    alone = plan_submission(recipe, [], out=tmp_path / "sweep", sweep=["seed=1"])
    assert not [line for line in lines_of(alone) if "--array" in line]


def test_dependencies(recipe: str, tmp_path: Path) -> None:
    planned = plan_submission(recipe, [], out=tmp_path / "run")
    assert "#SBATCH --dependency=afterok:12:13_1" in lines_of(planned, "12", "13_1")
    assert not [line for line in lines_of(planned) if "dependency" in line]


@pytest.mark.parametrize(
    ("time", "minutes"), [("00:01:00", 1), ("00:01:01", 2), ("01:00:00", 60), ("2-00:00:00", 2880)]
)
def test_minutes_are_rounded_up(recipe: str, tmp_path: Path, time: str, minutes: int) -> None:
    planned = plan_submission(recipe, [], out=tmp_path / "run")
    assert f"#SBATCH --time={minutes}" in lines_of(planned, time=time, signal_seconds=10)


# --- submitting -----------------------------------------------------------------------------------

SBATCH = """\
for file; do :; done
cp "$file" "FOLDER/script-$(ls FOLDER | grep -c script)"
echo "Submitted batch job $(( 40 + $(ls FOLDER | grep -c script) ))"
"""


def submit_all(planned: Submission, profile: Profile, *after: str) -> list[tuple[str, list[str]]]:
    write_files(planned, profile)
    found = submit(planned, profile, profile_name="slurm/cpu", after=after)
    return [(job.step, numbers) for job, numbers in found]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the scripts and counts from 41, in this folder."""
    folder = tmp_path / "sbatch"
    folder.mkdir()
    body = SBATCH.replace("FOLDER", str(folder))
    install(tmp_path, monkeypatch, sbatch=body, srun="exit 1")
    return folder


def test_a_stage_is_submitted(recipe: str, tmp_path: Path, sbatch: Path) -> None:
    run = tmp_path / "run"
    planned = plan_submission(recipe, [], out=run)
    profile = load_profile("cpu")
    assert submit_all(planned, profile, "7", "8_1") == [("", ["41"])]
    text = (sbatch / "script-0").read_text()
    assert text == script(planned.jobs[0], profile, dependencies=["7", "8_1"])
    (noted,) = jobs_of(run)
    assert (noted.number, noted.step, noted.profile) == ("41", "", "slurm/cpu")
    assert noted.log == f"{run}/slurm/41_0_log.out"


def test_what_is_pickled_is_a_name_and_strings(recipe: str, tmp_path: Path, sbatch: Path) -> None:
    run = tmp_path / "run"
    planned = plan_submission(recipe, ["seed=5"], out=run)
    submit_all(planned, load_profile("cpu"))
    content = (run / "slurm" / "41_submitted.pkl").read_bytes()
    strings = [argument for _, argument, _ in pickletools.genops(content) if argument is not None]
    assert set(planned.jobs[0].elements[0].words) <= set(strings)
    own = {text for text in strings if isinstance(text, str) and text.startswith("bigsimclr")}
    assert own == {"bigsimclr.launch.slurm"}
    delayed = pickle.loads(content)
    assert (delayed.function, delayed.args) == (become, planned.jobs[0].elements[0].words)
    assert delayed.kwargs == {}


def test_a_job_becomes_the_command(
    recipe: str, tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs as Slurm would run it, here to the point where there is no job."""
    run = tmp_path / "run"
    submit_all(plan_submission(recipe, [], out=run), load_profile("cpu"))
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    # What submitit reads; with SLURM_JOB_NODELIST missing, `bigsimclr srun` then refuses.
    environment |= {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}
    ended = subprocess.run(
        ["bash", str(sbatch / "script-0")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "bigsimclr: error: srun: this is not the batch script of a Slurm job" in ended.stderr


def test_a_sweep_is_submitted_at_once(recipe: str, tmp_path: Path, sbatch: Path) -> None:
    out = tmp_path / "sweep"
    planned = plan_submission(recipe, [], out=out, sweep=["seed=1,2"])
    profile = load_profile("cpu")
    assert submit_all(planned, profile) == [("", ["41_0", "41_1"])]
    text = (sbatch / "script-0").read_text()
    assert text == script(planned.jobs[0], profile, dependencies=())
    for element, seed in enumerate((1, 2)):
        run = out / f"seed={seed}"
        (noted,) = jobs_of(run)
        assert noted.number == f"41_{element}"
        assert noted.log == f"{out}/slurm/41_{element}_0_log.out"
        delayed = pickle.loads((out / "slurm" / f"41_{element}_submitted.pkl").read_bytes())
        assert delayed.args[1] == f"{run}/slurm/recipe.yaml"


def test_a_pipeline_is_submitted_step_by_step(pipeline: str, tmp_path: Path, sbatch: Path) -> None:
    planned = plan_submission(pipeline, [], out=tmp_path / "run")
    assert submit_all(planned, load_profile("cpu"), "7") == [
        ("pretrain", ["41"]),
        ("finetune", ["42"]),
        ("baseline", ["43"]),
    ]
    needs = ["afterok:7", "afterok:41", "afterok:7"]
    for number, need in enumerate(needs):
        text = (sbatch / f"script-{number}").read_text()
        assert text == script(
            planned.jobs[number],
            load_profile("cpu"),
            dependencies=need.removeprefix("afterok:").split(":"),
        )
        assert f"#SBATCH --dependency={need}\n" in text
    assert [(job.number, job.step) for job in jobs_of(tmp_path / "run")] == [
        ("41", "pretrain"),
        ("42", "finetune"),
        ("43", "baseline"),
    ]


@pytest.mark.parametrize("sweep", [[], ["seed=1,2"]])
def test_a_refused_job_leaves_nothing(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sweep: list[str],
) -> None:
    text = "Batch job submission failed: Invalid account or account/partition combination specified"
    install(tmp_path, monkeypatch, sbatch=refusal("sbatch", text), srun="exit 1")
    run = tmp_path / "run"
    planned = plan_submission(recipe, [], out=run, sweep=sweep)
    write_files(planned, load_profile("cpu"))
    before = sorted(run.rglob("*"))
    with pytest.raises(RecipeError) as caught:
        list(submit(planned, load_profile("cpu"), profile_name="cpu", after=()))
    assert str(caught.value) == f"Slurm refuses the job: {text}"
    assert sorted(run.rglob("*")) == before
    assert jobs_of(run) == []
    assert capsys.readouterr() == ("", "")


def test_no_sbatch_here(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    planned = plan_submission(recipe, [], out=tmp_path / "run")
    with pytest.raises(DistributedError, match="Slurm's sbatch is not here; run this on a login"):
        submit_all(planned, load_profile("cpu"))
    assert jobs_of(tmp_path / "run") == []


def test_an_answer_that_is_none(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, sbatch="echo hello", srun="exit 1")
    planned = plan_submission(recipe, [], out=tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        submit_all(planned, load_profile("cpu"))
    assert str(caught.value).startswith("Slurm refuses the job: Could not make sense of sbatch")
    assert str(caught.value).isprintable()
