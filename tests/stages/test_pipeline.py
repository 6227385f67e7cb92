"""Steps of one pipeline that begin at the same moment, as jobs of a cluster do."""

import threading
from pathlib import Path

import pytest

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import find_recipe, load_recipe
from bigsimclr.recipe.pipeline import plan_pipeline
from bigsimclr.recipe.schema import PipelineRecipe
from bigsimclr.stages.pipeline import _describe, _finished


def test_a_step_that_describes_the_pipeline_is_no_stranger_to_another(tmp_path: Path) -> None:
    source = find_recipe("digits")
    recipe = load_recipe(source)
    assert isinstance(recipe, PipelineRecipe)
    for attempt in range(15):
        directory = tmp_path / f"run-{attempt}"
        runs = plan_pipeline(recipe, source=source, overrides={}, directory=directory)
        first = [run for run in runs if run.parent is None]
        other = threading.Thread(target=_describe, args=(recipe, runs, directory, None))
        other.start()
        looks = 0
        while other.is_alive() or not looks:
            assert _finished(recipe, runs, first, directory) == []
            looks += 1
        other.join()
        assert (directory / "pipeline.yaml").exists()


def test_a_recipe_of_ones_own_is_not_written_over(tmp_path: Path) -> None:
    source = find_recipe("digits")
    recipe = load_recipe(source)
    assert isinstance(recipe, PipelineRecipe)
    (tmp_path / "pipeline.yaml").write_text("mine")
    runs = plan_pipeline(recipe, source=source, overrides={}, directory=tmp_path)
    with pytest.raises(RecipeError, match=r"is not a run directory: it holds pipeline\.yaml"):
        _finished(recipe, runs, runs[:1], tmp_path)
