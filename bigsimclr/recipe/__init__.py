"""Recipes: what a run is, as frozen data. Nothing here imports torch."""

from bigsimclr.recipe.explain import explain, recipe_schema
from bigsimclr.recipe.loader import (
    is_pipeline,
    load_recipe,
    parse_overrides,
    parse_recipe,
    recipe_text,
    save_recipe,
)
from bigsimclr.recipe.names import find_recipe, list_recipes, run_name

__all__ = [
    "explain",
    "find_recipe",
    "is_pipeline",
    "list_recipes",
    "load_recipe",
    "parse_overrides",
    "parse_recipe",
    "recipe_schema",
    "recipe_text",
    "run_name",
    "save_recipe",
]
