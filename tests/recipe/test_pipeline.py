"""A pipeline becomes runs; overrides reach the steps that have the key."""

from pathlib import Path

import pytest

from bigsimclr.errors import DataError, RecipeError
from bigsimclr.recipe import find_recipe, load_recipe, parse_overrides, recipe_text
from bigsimclr.recipe.pipeline import PlannedRun, missing_inputs, plan_pipeline
from bigsimclr.recipe.schema import (
    AnyStage,
    FinetuneRecipe,
    KnnRecipe,
    PipelineRecipe,
    PretrainRecipe,
)
from bigsimclr.stages import run_recipe
from tests.recipe.samples import FINETUNE, PIPELINE, PRETRAIN

KNN = "stage: knn\ndata: {kind: digits}\naugment: {image_size: 16}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "one.yaml").write_text(PRETRAIN)
    (tmp_path / "two.yaml").write_text(FINETUNE)
    (tmp_path / "three.yaml").write_text(KNN)
    file = tmp_path / "chain.yaml"
    file.write_text(PIPELINE + "  - {name: knn, recipe: three.yaml, parent: pretrain}\n")
    return file


def _plan(source: Path, *overrides: str) -> list[PlannedRun]:
    recipe = load_recipe(source)
    assert isinstance(recipe, PipelineRecipe)
    changes = parse_overrides(overrides)
    return plan_pipeline(recipe, source=source, overrides=changes, directory=Path("runs/x"))


def _refusal(source: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        _plan(source, *overrides)
    return str(caught.value)


def _recipes(runs: list[PlannedRun]) -> list[AnyStage]:
    return [run.recipe for run in runs]


def test_runs_parents_and_grid(source: Path) -> None:
    runs = _plan(source)
    assert [run.path for run in runs] == [
        "pretrain",
        "finetune/per_class=1",
        "finetune/per_class=2",
        "knn",
    ]
    assert [run.parent for run in runs] == [None, "pretrain", "pretrain", "pretrain"]
    last = runs[2].recipe
    assert isinstance(last, FinetuneRecipe)
    assert last.labels.per_class == 2
    assert last.parent == Path("runs/x/pretrain")


def test_override_for_every_step_that_has_the_key(source: Path) -> None:
    runs = _plan(source, "batch.global_batch=16", "augment.image_size=8")
    batches = [None if isinstance(r, KnnRecipe) else r.batch.global_batch for r in _recipes(runs)]
    assert batches == [16, 16, 16, None]
    assert [run.recipe.augment.image_size for run in runs] == [8, 8, 8, 8]


def test_override_for_one_step(source: Path) -> None:
    runs = _plan(source, "finetune.seed=5", "knn.neighbours=3")
    assert [run.recipe.seed for run in runs] == [0, 5, 5, 0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "scedule.steps=1",
            "override scedule.steps: no step has this key; did you mean 'schedule.",
        ),
        ("finetun.seed=1", "override finetun.seed: no step has this key"),
        ("finetune.sed=1", "override finetune.sed: unknown key; did you mean 'seed'?"),
        (
            "pretran.schedule.epochs=3",
            "override pretran.schedule.epochs: no step has this key; "
            "did you mean 'pretrain.schedule.epochs'?",
        ),
        (
            "pretrain.scedule.epochs=3",
            "override pretrain.scedule.epochs: unknown key 'scedule'; did you mean 'schedule'?",
        ),
        (
            "pretrain.schedule.steps=3",
            "override pretrain.schedule.steps: the recipe sets epochs; "
            "add pretrain.schedule.epochs=null",
        ),
        ("steps=3", "override steps: no step has this key; did you mean 'schedule.steps'?"),
        ("lr=3", "override lr: no step has this key; did you mean 'optimizer.learning_rate'?"),
        ("parent=runs/x", "override parent: the pipeline's steps have parents of their own"),
        (
            "finetune.parent=runs/x",
            "override finetune.parent: the pipeline gives this step the parent 'pretrain'",
        ),
        (
            "finetune.labels.per_class=3",
            "override finetune.labels.per_class: the grid of step 'finetune' sets this key",
        ),
        ("labels.per_class=3", "override labels.per_class: the grid of step 'finetune'"),
        ("knn.batch_size=0", "override knn.batch_size: should be greater than 0, not 0"),
    ],
)
def test_bad_override(source: Path, override: str, message: str) -> None:
    assert _refusal(source, override).startswith(message)


def test_unknown_recipe_of_a_step(source: Path) -> None:
    source.write_text(PIPELINE.replace("recipe: two", "recipe: tow"))
    assert _refusal(source).startswith(
        f"{source}:4: step 'finetune': recipe: tow: no such file and no recipe of that name; "
    )


def test_mistake_in_a_step_names_its_file(source: Path) -> None:
    (source.parent / "two.yaml").write_text(FINETUNE.replace("steps: 10", "steps: 0"))
    with pytest.raises(RecipeError, match=r"two\.yaml:6: schedule\.steps: should be greater"):
        _plan(source)


def test_pipeline_in_a_pipeline(source: Path) -> None:
    (source.parent / "two.yaml").write_text(PIPELINE)
    assert _refusal(source) == (
        f"{source}:4: step 'finetune': recipe: two is a pipeline; name the recipe of a stage"
    )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{name: b, recipe: two}", "step 'b' (finetune) needs parent: NAME of an earlier step"),
        (
            "{name: b, recipe: two, parent: finetune}",
            "step 'b' (finetune) builds on a pretrain step, and 'finetune' is finetune",
        ),
        (
            "{name: b, recipe: digits/6_distill, parent: pretrain}",
            "step 'b' (distill) builds on a finetune or supervised or distill or linear step, "
            "and 'pretrain' is pretrain",
        ),
        ("{name: b, recipe: one, parent: pretrain}", "step 'b' (pretrain) takes no parent; remove"),
        (
            "{name: b, recipe: one, grid: {seeds: [1, 2]}}",
            "step 'b': grid: seeds: unknown key; did you mean 'seed'?",
        ),
        (
            "{name: b, recipe: one, grid: {seed: [-1]}}",
            "step 'b': grid: seed: should be greater than or equal to 0, not -1",
        ),
        (
            "{name: b, recipe: two, parent: pretrain, grid: {labels.percent: [1]}}",
            "step 'b': grid: labels.percent: the recipe sets per_class; take it out there",
        ),
    ],
)
def test_bad_step(source: Path, step: str, message: str) -> None:
    source.write_text(f"{PIPELINE}  - {step}\n")
    assert _refusal(source).startswith(f"{source}:5: {message}")


def test_mistakes_of_all_steps_at_once(source: Path) -> None:
    source.write_text(
        PIPELINE.replace("recipe: two", "recipe: tow")
        + "  - {name: b, recipe: two}\n  - {name: c, recipe: one, grid: {sed: [1, 2]}}\n"
    )
    lines = _refusal(source).splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == [f"{source}:{n}" for n in (4, 5, 6)]
    assert lines[-1] == "3 errors, nothing was started."


@pytest.mark.parametrize(
    "parent",
    ["changes: {parent: runs/other}", "changes: {parent: net.safetensors}", ""],
)
def test_parent_outside_the_pipeline(source: Path, parent: str) -> None:
    source.write_text(
        f"stage: pipeline\nsteps:\n  - {{name: b, recipe: two, {parent}}}\n"
        "  - {name: c, recipe: digits/6_distill, parent: b}\n"
    )
    first, second = _plan(source, *([] if parent else ["b.parent=net.safetensors"]))
    assert isinstance(first.recipe, FinetuneRecipe)
    named = "runs/other" if "runs" in parent else "net.safetensors"
    assert (first.recipe.parent, first.parent) == (Path(named), None)
    assert second.parent == "b"


def test_parent_of_the_stage_recipe(source: Path) -> None:
    (source.parent / "two.yaml").write_text(f"{FINETUNE}parent: ~/net.safetensors\n")
    source.write_text("stage: pipeline\nsteps:\n  - {name: b, recipe: two}\n")
    (run,) = _plan(source)
    assert isinstance(run.recipe, FinetuneRecipe)
    assert run.recipe.parent == Path.home() / "net.safetensors"


CHANGED = """\
stage: pipeline
steps:
  - name: a
    recipe: one
    changes:
      backbone.depth: 18
      optimizer.learning_rate: 0.2
      parallel.deterministic: true
      schedule.epochs: null
      schedule.steps: 7
      data.kind: digits
  - name: b
    recipe: two
    parent: a
    grid: {labels.per_class: [1, 2]}
    changes: {batch.global_batch: 16}
"""


def test_changes_of_a_step(source: Path) -> None:
    source.write_text(CHANGED)
    first, *others = _plan(source)
    recipe = first.recipe
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.backbone.depth == 18
    assert recipe.optimizer.learning_rate == 0.2
    assert recipe.parallel.deterministic is True
    assert (recipe.schedule.epochs, recipe.schedule.steps) == (None, 7)
    assert recipe.batch.global_batch == 64
    for number, run in enumerate(others, start=1):
        assert isinstance(run.recipe, FinetuneRecipe)
        assert (run.recipe.batch.global_batch, run.recipe.labels.per_class) == (16, number)


def test_the_command_line_wins_over_changes(source: Path) -> None:
    source.write_text(CHANGED)
    runs = _plan(source, "optimizer.learning_rate=0.3", "b.batch.global_batch=32")
    rates, batches = [], []
    for run in runs:
        assert isinstance(run.recipe, PretrainRecipe | FinetuneRecipe)
        rates.append(run.recipe.optimizer.learning_rate)
        batches.append(run.recipe.batch.global_batch)
    assert rates == [0.3, 0.3, 0.3]
    assert batches == [64, 32, 32]


def test_changes_survive_writing_and_reading(source: Path) -> None:
    source.write_text(CHANGED)
    recipe = load_recipe(source)
    (source.parent / "again.yaml").write_text(recipe_text(recipe))
    assert load_recipe(source.parent / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("line", "mistake", "message"),
    [
        (6, "backbone.dept: 18", "changes: backbone.dept: unknown key; did you mean 'depth'?"),
        (6, "bakbone.depth: 18", "changes: bakbone.depth: bakbone: unknown key; did you mean 'ba"),
        (6, "lr: 18", "changes: lr: unknown key; did you mean 'optimizer.learning_rate'?"),
        (6, "backbone.depth: 17", "changes: backbone.depth: should be 10, 18,"),
        (6, "backbone.depth: [18]", "changes.backbone.depth: should be a number or text, not a l"),
        (
            7,
            "schedule.steps: 2\n      schedule.epochs: 1",
            "changes: schedule.epochs: give exactly",
        ),
        (6, "schedule.steps: 2", "changes: schedule.steps: the recipe sets epochs; take it out"),
        (5, "stage: knn", "changes: stage: is the recipe's; name another recipe"),
    ],
)
def test_bad_changes(source: Path, line: int, mistake: str, message: str) -> None:
    head, _, tail = CHANGED.partition("      backbone.depth: 18\n")
    tail = tail.partition("  - name: b")[0].partition("      optimizer")[0]
    source.write_text(f"{head}      {mistake}\n{tail}")
    assert _refusal(source).startswith(f"{source}:{line}: step 'a': {message}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "changes: {batch.global_batch: 16}",
            "changes: {labels.per_class: 3}",
            "changes: labels.per_class: the grid sets this key too; keep one",
        ),
        (
            "changes: {batch.global_batch: 16}",
            "changes: {parent: runs/x}",
            "changes: parent: the step has the parent 'a'; keep one",
        ),
        (
            "changes: {batch.global_batch: 16}",
            "changes: {parent: null}",
            "changes: parent: the step has the parent 'a'; keep one",
        ),
        (
            "grid: {labels.per_class: [1, 2]}",
            "grid: {parent: [runs/x]}",
            "grid: parent: the step has the parent 'a'; keep one",
        ),
    ],
)
def test_a_key_that_is_decided_twice(source: Path, old: str, new: str, message: str) -> None:
    text = CHANGED.replace(old, new)
    source.write_text(text)
    number = text.partition(new)[0].count("\n") + 1
    assert _refusal(source) == f"{source}:{number}: step 'b': {message}"


def test_files_that_only_later_runs_read_must_be_there(source: Path) -> None:
    source.write_text(
        "stage: pipeline\nsteps:\n"
        "  - {name: a, recipe: one}\n"
        "  - {name: b, recipe: two, parent: a,"
        " changes: {labels.per_class: null, labels.list: no/list.txt}}\n"
        "  - {name: c, recipe: three, changes: {parent: no/net.safetensors}}\n"
    )
    runs = _plan(source)
    lines = [missing_inputs(run) for run in runs]
    assert lines == [
        [],
        [
            "b.labels.list: there is no no/list.txt (relative to the current directory); give "
            "b.labels.list=FILE (ImageNet's official lists are imagenet_subsets/*.txt of "
            "google-research/simclr), or draw images: b.labels.list=null b.labels.percent=NUMBER"
        ],
        [
            "c.parent: there is no no/net.safetensors (relative to the current directory); give "
            "c.parent=DIR of a run, or a model file"
        ],
    ]
    out = source.parent / "out"
    with pytest.raises(DataError) as caught:
        run_recipe(load_recipe(source), name="x", out=out, source=source)
    assert str(caught.value).splitlines() == [*lines[1], *lines[2]]
    assert not out.exists()


def test_files_that_are_there_are_not_missing(source: Path) -> None:
    (source.parent / "list.txt").write_text("a.png\n")
    (source.parent / "net.safetensors").touch()
    source.write_text(
        "stage: pipeline\nsteps:\n"
        "  - {name: b, recipe: two, changes:"
        f" {{labels.per_class: null, labels.list: {source.parent / 'list.txt'},"
        f" parent: {source.parent / 'net.safetensors'}}}}}\n"
    )
    assert [missing_inputs(run) for run in _plan(source)] == [[]]
    (run,) = _plan(source, "b.labels.list=null", "b.labels.percent=1")
    assert isinstance(run.recipe, FinetuneRecipe)
    assert (run.recipe.labels.list, run.recipe.labels.percent) == (None, 1.0)


def test_copy_of_the_shipped_pipeline_works_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(find_recipe("digits").read_text())
    assert [run.path for run in _plan(file)] == [run.path for run in _plan(find_recipe("digits"))]
