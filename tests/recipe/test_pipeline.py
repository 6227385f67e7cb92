"""A pipeline becomes runs; overrides reach the steps that have the key."""

from pathlib import Path

import pytest

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import load_recipe, parse_overrides
from bigsimclr.recipe.pipeline import PlannedRun, plan_pipeline
from bigsimclr.recipe.schema import AnyStage, FinetuneRecipe, KnnRecipe, PipelineRecipe
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
        ("finetune.sed=1", "override sed: unknown key; did you mean 'seed'?"),
        ("labels.per_class=3", "override labels.per_class: the grid of step 'finetune'"),
        ("knn.batch_size=0", "override batch_size: should be greater than 0, not 0"),
    ],
)
def test_bad_override(source: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _plan(source, override)
    assert str(caught.value).startswith(message)


def test_unknown_recipe_of_a_step(source: Path) -> None:
    source.write_text(PIPELINE.replace("recipe: two", "recipe: tow"))
    with pytest.raises(RecipeError, match="tow: no such file"):
        _plan(source)


def test_mistake_in_a_step_names_its_file(source: Path) -> None:
    (source.parent / "two.yaml").write_text(FINETUNE.replace("steps: 10", "steps: 0"))
    with pytest.raises(RecipeError, match=r"two\.yaml:6: schedule\.steps: should be greater"):
        _plan(source)


def test_pipeline_in_a_pipeline(source: Path) -> None:
    (source.parent / "two.yaml").write_text(PIPELINE)
    with pytest.raises(RecipeError):
        _plan(source)
