"""What a dry run says: memory, hours and allocations, from arithmetic of its own; and scripts."""

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigsimclr.checking import CheckedRun, check_recipe
from bigsimclr.checking.allocation import allocation_rows, dry_run_text
from bigsimclr.cli import app
from bigsimclr.launch.profile import Profile, load_profile
from bigsimclr.launch.submission import plan_submission
from tests.recipe.samples import PRETRAIN

IMAGES = 1_281_167
LARGEST = [
    "backbone.depth=152",
    "backbone.width=3",
    "backbone.selective_kernel=true",
    "batch.micro_batch=64",
]
STEPS = round(800 * IMAGES / 4096)  # 800 epochs in batches of 4,096
USEFUL = 24 * 3600 - 300  # seconds of an allocation, until the run is asked to save


def checked(recipe: str, *changes: str, ranks: int) -> CheckedRun:
    (found,) = check_recipe(recipe, changes, world_size=ranks, examples=IMAGES)
    return found


def rows_of(run: CheckedRun, profile: Profile, speed: float | None = None) -> dict[str, str]:
    return dict(allocation_rows(run, profile, images_per_second=speed))


@pytest.fixture(scope="module")
def largest() -> CheckedRun:
    return checked("imagenet/1_pretrain", *LARGEST, ranks=64)


# --- the largest network of the paper -------------------------------------------------------------


def test_dry_run_of_the_largest_network(
    largest: CheckedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["submit", "imagenet/1_pretrain", *LARGEST, "--on", "slurm/h100_x64.yaml"]
    result = CliRunner().invoke(app, [*words, "--examples", str(IMAGES), "--dry-run"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    head, script = result.stdout.split("\n\n# batch script, in ")
    title, *lines = head.splitlines()
    run = tmp_path / "runs" / "imagenet-1_pretrain"
    assert title == f"# {run}"
    rows = dict(line.split("  ", 1) for line in lines)
    rows = {topic: text.strip() for topic, text in rows.items()}
    assert rows["steps"].startswith(f"{STEPS:,} updates of 4,096 images (800.0 epochs)")
    assert rows["ranks"] == "64: 8 nodes with 8 ranks on a GPU each, 12 CPUs for a rank"

    # Forward once, backward twice, two views of each image; H100's 989 TFLOP/s at 35%.
    cost = largest.cost
    assert cost is not None
    update = 3 * 2 * 4096 * cost.network.total.flops
    assert abs(update / 7.76e15 - 1) < 0.002
    seconds = STEPS * update / (0.35 * 989e12 * 64)
    assert rows["hours"].startswith(f"{seconds / 3600:.1f} h on 64 ranks, if 35% of 989 TFLOP/s ")
    assert math.ceil(seconds / USEFUL) == 2
    assert rows["allocations"] == "2 of 24:00:00, that is 1 requeue when the time is up"
    gigabytes = (cost.state_bytes + 128 * cost.view_bytes) / 1e9
    assert rows["gpu memory"] == f"about {gigabytes:.1f} GB of 80 GB of a h100: fits"

    folder, *made = script.splitlines()
    assert folder == f"{run}/slurm"
    asked = {line.removeprefix("#SBATCH --") for line in made if line.startswith("#SBATCH")}
    assert {"nodes=8", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12"} <= asked
    assert {"time=1440", "signal=USR2@300", "requeue", "exclusive"} <= asked
    assert made[-2:] == [
        f"# which goes on as: bigsimclr srun {run}/slurm/recipe.yaml --out {run} "
        f"--on {run}/slurm/profile.json",
        "# and starts the ranks by: srun --kill-on-bad-exit=0 --wait=60 --nodes=8 --ntasks=64 "
        "--ntasks-per-node=8 --cpus-per-task=12 --cpu-bind=cores ...",
    ]


@pytest.mark.parametrize("speed", [10.0, 250.0, 12_345.6])
def test_a_measured_speed_replaces_the_estimate(largest: CheckedRun, speed: float) -> None:
    profile = load_profile("h100_x64")
    rows = rows_of(largest, profile, speed)
    seconds = STEPS * 4096 / (speed * 64)
    hours = seconds / 3600
    written = f"{hours:,.0f} h" if hours >= 100 else f"{hours:.1f} h"
    assert rows["hours"] == f"{written} on 64 ranks, at {speed:g} images a second and rank"
    count = math.ceil(seconds / USEFUL)
    assert rows["allocations"].startswith(f"{count} of 24:00:00, that is {count - 1} requeue")


def test_a_network_that_does_not_fit() -> None:
    run = checked("imagenet/1_pretrain", *LARGEST[:3], "batch.micro_batch=512", ranks=8)
    rows = rows_of(run, load_profile("h100_x8"))
    assert rows["gpu memory"].endswith(
        "of 80 GB of a h100: does not fit; bigsimclr check --gpus lists what takes less"
    )
    larger = load_profile("h100_x8", {"gpu": "h200"})
    assert " of 140 GB of a h200: " in rows_of(run, larger)["gpu memory"]


def test_a_slower_gpu_takes_longer(largest: CheckedRun) -> None:
    assert largest.cost is not None
    assert largest.cost.total_flops is not None
    profile = load_profile("h100_x64", {"gpu": "a100"})
    hours = largest.cost.total_flops / (0.35 * 312e12 * 64) / 3600
    rows = rows_of(largest, profile)
    assert rows["hours"].startswith(f"{hours:.1f} h on 64 ranks, if 35% of 312 TFLOP/s")
    count = math.ceil(hours * 3600 / USEFUL)
    assert (
        rows["allocations"]
        == f"{count} of 24:00:00, that is {count - 1} requeues when the time is up"
    )


def test_without_requeue_each_allocation_is_submitted(largest: CheckedRun) -> None:
    rows = rows_of(largest, load_profile("h100_x64", {"requeue": False}))
    assert rows["allocations"].endswith("; requeue: false, so each has to be submitted")


# --- what is not known ----------------------------------------------------------------------------


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    profile = load_profile("cpu")
    rows = rows_of(checked("imagenet/1_pretrain", ranks=2), profile)
    assert rows == {
        "ranks": "2: 2 nodes with 1 rank on CPUs, 2 CPUs for a rank",
        "hours": "not known; --images-per-second N says what a rank does",
    }
    (uncounted,) = check_recipe("imagenet/1_pretrain", [], world_size=2)
    rows = rows_of(uncounted, profile, 100.0)
    assert rows["hours"] == "not known: so are the steps; give --examples N"
    assert "allocations" not in rows


# --- several runs ---------------------------------------------------------------------------------


def text_of(tmp_path: Path, *changes: str, sweep: tuple[str, ...] = (), waits: bool = False) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(PRETRAIN)
    planned = plan_submission(str(file), changes, out=tmp_path / "run", sweep=sweep, waits=waits)
    return dry_run_text(
        planned,
        load_profile("cpu"),
        str(file),
        changes,
        examples=None,
        speed=None,
        waits=waits,
    )


def test_every_run_of_a_sweep_has_its_plan(tmp_path: Path) -> None:
    text = text_of(tmp_path, sweep=("schedule.epochs=1,2",))
    one, two = (
        text.index(f"# {tmp_path}/run/epochs=1\n"),
        text.index(f"# {tmp_path}/run/epochs=2\n"),
    )
    assert " (1.0 epochs)" in text[one:two]
    assert " (2.0 epochs)" in text[two:]
    assert text.count("# which goes on as: bigsimclr srun ") == 2
    assert "#SBATCH --array=0-1%2\n" in text


def test_a_required_key_may_come_from_the_sweep_alone(tmp_path: Path) -> None:
    text = text_of(tmp_path, "data.kind=folder", sweep=("data.root=a,b",))
    assert "data.root: a does not exist" in text
    assert "data.root: b does not exist" in text


def test_jobs_that_come_first_are_named(tmp_path: Path) -> None:
    assert "--dependency=afterok:JOB_BEFORE\n" in text_of(tmp_path, waits=True)
    assert "--dependency" not in text_of(tmp_path)


def test_a_pipeline_names_the_jobs_that_its_jobs_wait_for(tmp_path: Path) -> None:
    planned = plan_submission("digits", [], out=tmp_path / "run")
    text = dry_run_text(
        planned, load_profile("cpu"), "digits", [], examples=None, speed=50.0, waits=False
    )
    assert text.count("\n# batch script of step ") == len(planned.jobs)
    assert text.count("--dependency=afterok:JOB_OF_PRETRAIN\n") == sum(
        job.needs == ("pretrain",) for job in planned.jobs
    )
    assert text.count(" at 50 images a second and rank") >= len(planned.jobs) - 1


def test_a_line_break_in_a_change_begins_no_line(tmp_path: Path) -> None:
    changes = ["pretrain.data.kind=folder", "pretrain.data.root=x\ntouch canary #"]
    planned = plan_submission("digits", changes, out=tmp_path / "run")
    text = dry_run_text(
        planned, load_profile("cpu"), "digits", changes, examples=None, speed=None, waits=False
    )
    assert not [line for line in text.splitlines() if line.startswith("touch")]
    assert "data.root=x\\ntouch canary" in text
