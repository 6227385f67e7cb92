"""Every recipe that ships can be loaded, found by name, and says what it is."""

import pytest

from bigsimclr.recipe import find_recipe, is_pipeline, list_recipes, load_recipe
from bigsimclr.recipe.pipeline import plan_pipeline
from bigsimclr.recipe.plan import rule_breaches
from bigsimclr.recipe.schema import PipelineRecipe
from tests.architecture.tree import ROOT


def test_every_recipe_file_is_listed() -> None:
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert sorted(find_recipe(name).resolve() for name in list_recipes()) == files


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_loads(name: str) -> None:
    file = find_recipe(name)
    recipe = load_recipe(file)
    assert is_pipeline(file) == isinstance(recipe, PipelineRecipe)
    if isinstance(recipe, PipelineRecipe):
        assert plan_pipeline(recipe, source=file, overrides={}, directory=ROOT / "runs")
    else:
        assert rule_breaches(recipe) == []


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = find_recipe(name).read_text(encoding="utf-8")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert comment, name
    assert f"bigsimclr run {name}" in "\n".join(comment)
