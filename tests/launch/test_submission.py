"""From a recipe to its jobs: plans, what is written for them, whom they wait for, refusals."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from bigsimclr.errors import DataError, RecipeError, StorageError
from bigsimclr.launch.jobs import SubmittedJob, job_folder, jobs_of, make_job_folder, note_jobs
from bigsimclr.launch.profile import Profile, load_profile
from bigsimclr.launch.slurm import script
from bigsimclr.launch.submission import (
    Submission,
    check_cluster,
    check_idle,
    jobs_to_wait_for,
    note_submitted,
    plan_submission,
    write_files,
)
from bigsimclr.recipe import load_recipe
from bigsimclr.recipe.pipeline import plan_pipeline
from bigsimclr.recipe.schema import PipelineRecipe, PretrainRecipe
from tests.launch.cluster import HOSTILE, answer, install, outcome
from tests.recipe.samples import FINETUNE, PIPELINE, PRETRAIN

SUPERVISED = FINETUNE.replace("finetune", "supervised") + "backbone: {depth: 10}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(PRETRAIN)
    return str(file)


@pytest.fixture
def pipeline(tmp_path: Path) -> str:
    (tmp_path / "one.yaml").write_text(PRETRAIN)
    labelled = FINETUNE.replace("{kind: folder, root: images}", "{kind: digits}")
    (tmp_path / "two.yaml").write_text(labelled)
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE + "  - {name: baseline, recipe: digits/4_supervised}\n")
    return str(file)


def labels(submission: Submission) -> list[str]:
    return [element.run.name for job in submission.jobs for element in job.elements]


# --- one stage ------------------------------------------------------------------------------------


def test_a_stage_is_one_job(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    planned = plan_submission(recipe, ["schedule.epochs=5"], out=run)
    assert (planned.out, planned.finished, planned.pipeline) == (run, (), None)
    (job,) = planned.jobs
    assert (job.step, job.name, job.folder, job.needs) == ("", "first", run / "slurm", ())
    (element,) = job.elements
    assert element.run == run
    assert element.words == (
        "srun",
        f"{run}/slurm/recipe.yaml",
        "--out",
        str(run),
        "--on",
        f"{run}/slurm/profile.json",
    )
    assert element.recipe == load_recipe(recipe, ["schedule.epochs=5"])
    assert not run.exists()  # nothing is written by a plan


def test_a_relative_directory_is_made_absolute(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = plan_submission(recipe, [], out=Path("a/b"))
    assert planned.out == tmp_path / "a" / "b"
    assert planned.jobs[0].name == "a-b"


def test_a_missing_parent_is_refused_unless_another_run_may_make_it(tmp_path: Path) -> None:
    changes = [f"parent={tmp_path / 'runs' / 'pretrain'}"]
    plan = partial(plan_submission, "digits/5_finetune", changes, out=tmp_path / "run")
    with pytest.raises(DataError) as caught:
        plan()
    assert str(caught.value).startswith(f"parent: there is no {tmp_path}/runs/pretrain; give")
    assert len(plan(waits=True).jobs) == 1
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    assert len(plan().jobs) == 1


# --- a sweep --------------------------------------------------------------------------------------


def test_a_sweep_is_one_array(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep = ["loss.temperature=0.1,0.5", "seed=[1, 2, 3]"]
    planned = plan_submission(recipe, ["schedule.epochs=2"], out=out, sweep=sweep)
    (job,) = planned.jobs
    assert job.folder == out / "slurm"
    points = [(t, s) for t in (0.1, 0.5) for s in (1, 2, 3)]
    assert labels(planned) == [f"temperature={t},seed={s}" for t, s in points]
    for element, (temperature, seed) in zip(job.elements, points, strict=True):
        assert isinstance(element.recipe, PretrainRecipe)
        assert (element.recipe.loss.temperature, element.recipe.seed) == (temperature, seed)
        assert element.recipe.schedule.epochs == 2.0
        assert element.run == out / element.run.name
        assert element.words[1] == f"{element.run}/slurm/recipe.yaml"


def test_values_of_a_sweep_are_yaml(recipe: str, tmp_path: Path) -> None:
    def values(text: str) -> list[object]:
        planned = plan_submission(recipe, [], out=tmp_path / "x", sweep=[text])
        found = []
        for element in planned.jobs[0].elements:
            assert isinstance(element.recipe, PretrainRecipe)
            found.append(element.recipe.augment.crop_area)
        return found

    assert values("augment.crop_area=[0.1, 1.0],[0.5, 1.0]") == [(0.1, 1.0), (0.5, 1.0)]
    assert values("augment.crop_area=[[0.1, 1.0], [0.5, 1.0]]") == [(0.1, 1.0), (0.5, 1.0)]
    planned = plan_submission(
        recipe, [], out=tmp_path / "x", sweep=["backbone={kind: resnet, depth: 18}"]
    )
    assert labels(planned) == ["backbone=--kind----resnet-,--depth---18-"]


def test_sections_and_signs_make_plain_labels(recipe: str, tmp_path: Path) -> None:
    sweep = ["data={kind: folder, root: a/b},{kind: folder, root: 'c d'}"]
    found = labels(plan_submission(recipe, [], out=tmp_path / "x", sweep=sweep))
    assert len(set(found)) == 2
    assert all(set(label) <= set("abcdefghijklmnopqrstuvwxyz-=,._") for label in found)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["seed=1,2,1"], "--array: two combinations are the same; name each value once"),
        (["loss.temperature=0.1,1e-1"], "--array: two combinations are the same"),
        (["seed"], "--array seed: write it as KEY=VALUE,VALUE,..."),
        ([""], "--array : write it as KEY=VALUE,VALUE,..."),
        (["seed="], "--array seed: write it as KEY=VALUE,VALUE,..."),
        (["seed=[]"], "--array seed: write it as KEY=VALUE,VALUE,..."),
        (["seed=1,]"], "--array seed: "),
        (["seed=1,2", "seed=3"], "override seed: is given twice; keep one"),
        (["sed=1,2"], "override sed: unknown key; did you mean 'seed'?"),
        (["seed=1,x"], "override seed: "),
        (["optimizer.kind=" + "x" * 300 + ",y"], "--array: 'kind=xxx"),
    ],
)
def test_sweeps_that_are_refused(
    recipe: str, tmp_path: Path, sweep: list[str], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_submission(recipe, [], out=tmp_path / "x", sweep=sweep)
    assert str(caught.value).startswith(message)


def test_a_key_that_is_changed_and_swept(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="override seed: is given twice; keep one"):
        plan_submission(recipe, ["seed=1"], out=tmp_path / "x", sweep=["seed=1,2"])


def test_a_pipeline_is_no_sweep(pipeline: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--array: a pipeline has grids of its own"):
        plan_submission(pipeline, [], out=tmp_path / "x", sweep=["seed=1,2"])


def test_a_key_that_only_the_sweep_gives(recipe: str, tmp_path: Path) -> None:
    sweep = ["data.root=a,b"]
    planned = plan_submission(recipe, ["data.kind=folder"], out=tmp_path / "x", sweep=sweep)
    assert labels(planned) == ["root=a", "root=b"]
    assert [element.changes for element in planned.jobs[0].elements] == [
        ('data.root="a"',),
        ('data.root="b"',),
    ]


# --- a pipeline -----------------------------------------------------------------------------------


def test_a_pipeline_is_a_job_for_each_step(pipeline: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["pretrain.schedule.epochs=2"]
    planned = plan_submission(pipeline, changes, out=out)
    assert [(job.step, job.needs) for job in planned.jobs] == [
        ("pretrain", ()),
        ("finetune", ("pretrain",)),
        ("baseline", ()),
    ]
    assert planned.finished == ()
    for job in planned.jobs:
        assert job.folder == out / "slurm"
        assert job.name == f"run-{job.step}"
        (element,) = job.elements
        assert (element.run, element.recipe) == (out, None)
        assert element.words == (
            *("srun", f"{out}/slurm/recipes/pipeline.yaml", *changes),
            *("--only", job.step, "--out", str(out), "--on", f"{out}/slurm/profile.json"),
        )


def test_finished_steps_get_no_job(pipeline: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished = ["pretrain", "finetune/per_class=1"]
    for path in finished:
        (out / path).mkdir(parents=True)
        (out / path / "result.json").write_text("{}")
    planned = plan_submission(pipeline, [], out=out)
    assert planned.finished == ("pretrain",)
    # Half of its grid is missing, and its parent is there.
    assert [(job.step, job.needs) for job in planned.jobs] == [("finetune", ()), ("baseline", ())]
    for path in ("finetune/per_class=2", "baseline"):
        (out / path).mkdir(parents=True)
        (out / path / "result.json").write_text("{}")
    planned = plan_submission(pipeline, [], out=out)
    assert (planned.jobs, planned.finished) == ((), ("pretrain", "finetune", "baseline"))


def test_a_list_of_labels_that_is_missing_stops_all_steps(pipeline: str, tmp_path: Path) -> None:
    changes = ["baseline.labels.list=nowhere.txt", "baseline.labels.per_class=null"]
    with pytest.raises(DataError, match=r"^baseline\.labels\.list: there is no nowhere\.txt"):
        plan_submission(pipeline, changes, out=tmp_path / "run")


# --- what is written ------------------------------------------------------------------------------


def test_later_edits_of_a_recipe_change_nothing(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    planned = plan_submission(recipe, ["seed=5"], out=run)
    profile = load_profile("h100_x32")
    Path(recipe).write_text("stage: pretrain\n")  # edited between plan and submission
    write_files(planned, profile)
    Path(recipe).unlink()
    assert load_recipe(run / "slurm" / "recipe.yaml") == planned.jobs[0].elements[0].recipe
    assert load_profile(run / "slurm" / "profile.json") == profile
    assert {path.name for path in (run / "slurm").iterdir()} == {"recipe.yaml", "profile.json"}
    assert (run / "slurm").stat().st_mode & 0o777 == 0o700


def test_every_run_of_a_sweep_gets_its_own_files(recipe: str, tmp_path: Path) -> None:
    planned = plan_submission(recipe, [], out=tmp_path / "sweep", sweep=["seed=1,2"])
    write_files(planned, load_profile("cpu"))
    for seed in (1, 2):
        folder = tmp_path / "sweep" / f"seed={seed}" / "slurm"
        stored = load_recipe(folder / "recipe.yaml")
        assert isinstance(stored, PretrainRecipe)
        assert stored.seed == seed
        assert load_profile(folder / "profile.json") == load_profile("cpu")
    assert list((tmp_path / "sweep" / "slurm").iterdir()) == []


def test_a_pipeline_is_copied_with_the_recipes_of_its_steps(pipeline: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"pretrain.schedule.epochs": 2}
    recipe = load_recipe(pipeline)
    assert isinstance(recipe, PipelineRecipe)
    before = plan_pipeline(recipe, source=Path(pipeline), overrides=changes, directory=out)
    write_files(plan_submission(pipeline, [], out=out), load_profile("cpu"))
    for name in ("one.yaml", "two.yaml", "pipeline.yaml"):
        (tmp_path / name).write_text("stage: knn\n")
    copied = out / "slurm" / "recipes" / "pipeline.yaml"
    stored = load_recipe(copied)
    assert isinstance(stored, PipelineRecipe)
    after = plan_pipeline(stored, source=copied, overrides=changes, directory=out)
    assert [(run.step, run.path, run.parent, run.recipe) for run in after] == [
        (run.step, run.path, run.parent, run.recipe) for run in before
    ]
    files = {path.name for path in copied.parent.iterdir()}
    assert files == {"pipeline.yaml", "pretrain.yaml", "finetune.yaml", "baseline.yaml"}


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o722, 0o777])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, bits: int) -> None:
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    folder.chmod(bits)
    with pytest.raises(StorageError) as caught:
        make_job_folder(tmp_path / "run")
    assert str(caught.value) == (
        f"{folder} can be written by others, and a job would execute what they put there: "
        f"chmod 700 {folder}"
    )
    folder.chmod(0o755)
    assert make_job_folder(tmp_path / "run") == folder


def test_a_loose_umask_does_not_open_the_folder(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = make_job_folder(tmp_path / "run")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_a_link_is_refused(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "slurm"
    link.symlink_to(tmp_path / "elsewhere")
    planned = plan_submission(recipe, [], out=tmp_path / "run")
    with pytest.raises(StorageError, match="is a link; use another --out"):
        write_files(planned, load_profile("cpu"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="slurm cannot be made: File exists"):
        make_job_folder(tmp_path / "run")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="run/slurm cannot be made: Not a directory"):
        make_job_folder(tmp_path / "run")


# --- which job works on what ----------------------------------------------------------------------


def submitted(run: Path, *numbers: str) -> None:
    make_job_folder(run)
    note_jobs(run, [SubmittedJob(number, "", str(run / "log"), 1.0, "cpu") for number in numbers])


def test_jobs_are_noted_for_every_run(recipe: str, tmp_path: Path) -> None:
    planned = plan_submission(recipe, [], out=tmp_path / "sweep", sweep=["seed=1,2"])
    write_files(planned, load_profile("cpu"))
    logs = [tmp_path / "a.out", tmp_path / "b.out"]
    note_submitted(planned.jobs[0], ["12_0", "12_1"], logs, "slurm/cpu")
    note_submitted(planned.jobs[0], ["13_0", "13_1"], logs, "mine.yaml")
    found = jobs_of(tmp_path / "sweep" / "seed=2")
    assert [(job.number, job.log, job.profile) for job in found] == [
        ("12_1", str(logs[1]), "slurm/cpu"),
        ("13_1", str(logs[1]), "mine.yaml"),
    ]
    assert found[1].submitted >= found[0].submitted > 1.7e9


def test_damaged_lists_of_jobs_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    submitted(tmp_path, "12", "13")
    path = job_folder(tmp_path) / "jobs.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([b"[]", lines[0], b'{"number": "9"}', b"\xff", lines[1][:20]]))
    assert [job.number for job in jobs_of(tmp_path)] == ["12"]
    assert jobs_of(tmp_path / "none") == []


def test_a_run_that_a_job_works_on_is_refused(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, squeue=answer("12_1|PENDING|Priority|0:00|1:00"))
    planned = plan_submission(recipe, [], out=tmp_path / "sweep", sweep=["seed=1,2"])
    submitted(tmp_path / "sweep" / "seed=2", "11", "12_0")
    check_idle(planned)
    submitted(tmp_path / "sweep" / "seed=2", "12_1")
    run = tmp_path / "sweep" / "seed=2"
    with pytest.raises(RecipeError) as caught:
        check_idle(planned)
    assert str(caught.value) == (
        f"{run}: job 12_1 works on it (PENDING); bigsimclr cancel {run} ends it, and another "
        "--out makes a new run"
    )


def test_whom_to_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = "12|RUNNING|None|1:00|1:00\n13_0|PENDING|None|0:00|1:00"
    calls = install(tmp_path, monkeypatch, squeue=answer(queue))
    assert jobs_to_wait_for([]) == []
    assert calls.read_text() == ""
    submitted(tmp_path / "a", "11", "12")
    submitted(tmp_path / "b", "13_0")
    assert jobs_to_wait_for([tmp_path / "a", tmp_path / "b"]) == ["12", "13_0"]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "result.json").write_text("{}")
    steps = {"steps": [{"runs": [{"path": "x"}, {"path": "y"}]}, {"runs": [{"path": "z"}]}]}
    for path in "xyz":
        (tmp_path / "pipeline" / path).mkdir(parents=True)
        (tmp_path / "pipeline" / path / "result.json").write_text("{}")
    (tmp_path / "pipeline" / "pipeline.json").write_text(json.dumps(steps))
    assert jobs_to_wait_for([tmp_path / "done", tmp_path / "pipeline"]) == []
    (tmp_path / "pipeline" / "z" / "result.json").unlink()
    submitted(tmp_path / "ended", "9")
    for name in ("pipeline", "ended", "none"):
        with pytest.raises(RecipeError) as caught:
            jobs_to_wait_for([tmp_path / name])
        text = f"--after {tmp_path / name}: no job works on it, and it is not finished"
        assert str(caught.value) == text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"steps": 1}', '{"steps": [1]}'])
def test_a_damaged_pipeline_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    install(tmp_path, monkeypatch, squeue="true")
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(RecipeError, match="no job works on it, and it is not finished"):
        jobs_to_wait_for([tmp_path])


# --- what the cluster can serve -------------------------------------------------------------------

PARTITIONS = """\
PartitionName=cpu Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4
PartitionName=gpu Default=NO MaxNodes=2 MaxTime=02:00:00 State=UP TotalNodes=4
"""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "1: partition: the cluster has no default; name one of cpu, gpu"),
        (["partition=gpus"], "2: partition: the cluster has no partition 'gpus'; did you mean "),
        (["partition=zzz"], "2: partition: the cluster has no partition 'zzz'; it has cpu, gpu"),
        (["partition=cpu,zzz"], "2: partition: the cluster has no partition 'zzz'"),
        (
            ["partition=gpu", "time=02:00:01"],
            "1: time: 02:00:01 is more than partition 'gpu' gives (02:00:00)",
        ),
        (["partition=gpu", "nodes=3"], "nodes: 3 are more than partition 'gpu' gives (2)"),
        (["partition=cpu", "nodes=5"], "nodes: 5 are more than partition 'cpu' gives (4)"),
    ],
)
def test_what_a_cluster_cannot_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], message: str
) -> None:
    install(tmp_path, monkeypatch, scontrol=answer(PARTITIONS))
    file = tmp_path / "mine.yaml"
    partition = "" if not keys else "partition: cpu\n"
    file.write_text(f"time: 01:00:00\n{partition}")
    profile = load_profile(file, keys)
    with pytest.raises(RecipeError) as caught:
        check_cluster(profile, str(file))
    assert str(caught.value).startswith(f"{file}:")
    assert message in str(caught.value)


def test_what_a_cluster_can_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PARTITIONS.replace("gpu Default=NO", "gpu Default=YES")
    install(tmp_path, monkeypatch, scontrol=answer(text))

    def check(**keys: object) -> None:
        check_cluster(Profile.model_validate({"time": "02:00:00", **keys}), "cpu")

    check(nodes=2)
    check(nodes=4, partition="cpu", time="99-00:00:00")
    check(nodes=2, partition="cpu,gpu")


# --- texts that would like to be commands ---------------------------------------------------------


def sbatch_lines(planned: Submission) -> list[str]:
    profile = Profile(time="01:00:00", python=Path("/usr/python"))
    (job, *_) = planned.jobs
    return script(job, profile, dependencies=()).splitlines()


def test_hostile_run_directories(recipe: str, tmp_path: Path) -> None:
    usual = sbatch_lines(plan_submission(recipe, [], out=tmp_path / "usual"))
    accepted = []
    for text in HOSTILE:
        if text == "/":
            continue
        out = tmp_path / "runs" / text
        planned, refused = outcome(partial(plan_submission, recipe, [], out=out))
        if planned is None:
            assert refused.startswith("--out: "), refused
            continue
        accepted.append(text)
        _check_script(sbatch_lines(planned), usual, planned.out)
        write_files(planned, Profile(time="01:00:00"))  # nor does the file system mind
    assert {"-x", "a b", "a,b", "a=b", "é", "a\u540d\u524db", "a:b"} <= set(accepted)
    assert not any(set(text) & set("'\"`$;\n\\%#~{}*?[]()|&<>\0\t\x1b") for text in accepted)


def _check_script(lines: Sequence[str], usual: Sequence[str], out: Path) -> None:
    import shlex

    assert len(lines) == len(usual)
    changed = [line for line, other in zip(lines, usual, strict=True) if line != other]
    name, output, command = (shlex.split(line) for line in changed)
    assert name[0] == output[0] == "#SBATCH"
    assert len(name) == len(output) == 2
    shown = name[1].removeprefix("--job-name=")
    assert shown
    assert shown[0] != "-"
    assert shown.isascii()
    assert not set(shown) & set("'\"`$;\n\\%# /")
    assert output[1] == f"--output={out}/slurm/%j_0_log.out"
    assert command == ["exec", "/usr/python", "-u", "-m", "submitit.core._submit", f"{out}/slurm"]


def test_hostile_overrides_never_reach_the_script(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = ["data.kind=folder"]
    usual = sbatch_lines(plan_submission(recipe, [], out=run))
    words = plan_submission(recipe, [], out=run).jobs[0].elements[0].words
    accepted = []
    for text in HOSTILE:
        changes = [*folder, f"data.root={text}"]
        planned, refused = outcome(partial(plan_submission, recipe, changes, out=run))
        if planned is None:
            assert "data.root" in refused, refused
            continue
        accepted.append(text)
        assert sbatch_lines(planned) == usual
        assert planned.jobs[0].elements[0].words == words
        write_files(planned, Profile(time="01:00:00"))
        assert load_recipe(run / "slurm" / "recipe.yaml") == planned.jobs[0].elements[0].recipe
    assert {"a$(touch canary)b", "a;touch canary;b", "a'b", "a" * 300} <= set(accepted)


def test_hostile_changes_of_a_pipeline_are_single_words(pipeline: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    usual = sbatch_lines(plan_submission(pipeline, [], out=run))
    accepted = 0
    for text in HOSTILE:
        changes = ["pretrain.data.kind=folder", f"pretrain.data.root={text}"]
        planned, refused = outcome(partial(plan_submission, pipeline, changes, out=run))
        if planned is None:
            assert "data.root" in refused, refused
            continue
        accepted += 1
        assert sbatch_lines(planned) == usual
        assert planned.jobs[0].elements[0].words[2:4] == tuple(changes)
    assert accepted >= 40


def test_hostile_parents_are_refused(tmp_path: Path) -> None:
    for text in HOSTILE:
        changes = [f"parent={text}"]
        plan = partial(plan_submission, "digits/5_finetune", changes, out=tmp_path / "run")
        planned, refused = outcome(plan)
        assert planned is not None or refused.startswith(("parent: ", "override parent: ")), refused


def test_hostile_sweeps(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    usual = sbatch_lines(plan_submission(recipe, [], out=out, sweep=["seed=1,2"]))
    accepted = 0
    for text in HOSTILE:
        sweep = [f"data.root={text},zzz"]
        plan = partial(plan_submission, recipe, ["data.kind=folder"], out=out, sweep=sweep)
        planned, refused = outcome(plan)
        if planned is None:
            assert "--array" in refused or "data.root" in refused, refused
            continue
        accepted += 1
        if len(labels(planned)) == 2:  # a comma makes three
            assert sbatch_lines(planned) == usual
        for label in labels(planned):
            assert label.isascii()
            assert not set(label) & set("'\"`$;\n\\%# /\0")
            assert label.startswith("root=")
    assert accepted >= 40
    keys = [f"{text}=1,2" for text in HOSTILE]
    for key in keys:
        planned, refused = outcome(partial(plan_submission, recipe, [], out=out, sweep=[key]))
        assert planned is None
        assert refused


def test_hostile_runs_to_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue="true")
    for text in HOSTILE:
        found, refused = outcome(partial(jobs_to_wait_for, [tmp_path / "runs" / text]))
        assert found is None
        assert refused.startswith("--after"), refused
        assert refused.isprintable()
