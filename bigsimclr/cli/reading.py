"""Commands that show recipes and their keys, and draw labelled images."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bigsimclr.cli.command import OverridesArgument, RecipeArgument
from bigsimclr.errors import RecipeError


def explain(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key, such as loss.temperature.")
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Explain every key.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --all: the page docs/recipes.md.")
    ] = False,
) -> None:
    """Say what a key of a recipe means: type, range, default, source."""
    from bigsimclr.recipe.explain import explain as explain_key, explain_all

    if everything == (key is not None):
        raise RecipeError("explain: give either a key or --all")
    print(explain_all(markdown=markdown) if key is None else explain_key(key))


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from bigsimclr.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


def recipes_ls() -> None:
    """List the recipes that ship, each with the first line of its file."""
    from bigsimclr.recipe import find_recipe, list_recipes

    names = list_recipes()
    width = max((len(name) for name in names), default=0)
    for name in names:
        first = find_recipe(name).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('#').strip()}".rstrip())


def recipes_cat(name: RecipeArgument) -> None:
    """Print a recipe as its file has it."""
    from bigsimclr.recipe import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


def recipes_cp(
    name: RecipeArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write; must not exist yet.")
    ],
) -> None:
    """Copy a recipe to a file of your own."""
    from bigsimclr.recipe import find_recipe
    from bigsimclr.storage import publish

    text = find_recipe(name).read_text(encoding="utf-8")
    publish(file, text, overwrite=False)
    print(f"{file}: a copy of {name}")


def data_split(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="List file to write.")],
    per_class: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Labelled images per class.")
    ] = None,
    percent: Annotated[
        float | None, typer.Option(metavar="P", help="Labelled share in percent.")
    ] = None,
    draw: Annotated[int, typer.Option(metavar="N", min=0, help="Number of the random draw.")] = 0,
) -> None:
    """Draw labelled images and write their names.

    They are drawn from the recipe's training images; with the same data keys, labels.list reads
    the file.
    """
    from bigsimclr.data import build_data
    from bigsimclr.data.subsets import select_labels, subset_hash
    from bigsimclr.recipe import load_recipe
    from bigsimclr.recipe.schema import PipelineRecipe
    from bigsimclr.storage import publish

    if (per_class is None) == (percent is None):
        raise RecipeError("data split: give exactly one of --per-class and --percent")
    if percent is not None and not 0 < percent <= 100:
        raise RecipeError(f"data split: --percent {percent} is not in (0, 100]")
    loaded = load_recipe(recipe, overrides or ())
    if isinstance(loaded, PipelineRecipe):
        raise RecipeError(f"data split: {recipe} is a pipeline; name one of its stages' recipes")
    train = build_data(loaded.data).train
    chosen = select_labels(train, per_class=per_class, percent=percent, draw=draw)
    names = [train.name(int(index)) for index in chosen]
    publish(out, "".join(f"{name}\n" for name in names), overwrite=False)
    print(f"{out}: {len(names)} of {len(train)} images, sha256 {subset_hash(names)}")
