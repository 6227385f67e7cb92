"""Recipes by name: the ones that ship with the package, and files."""

from pathlib import Path

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.keys import nearest
from bigsimclr.recipe.yaml_tree import show

_PIPELINE = "pipeline"  # digits/pipeline.yaml goes by the name digits


def recipes_folder() -> Path:
    """Return the folder of the recipes that ship: in the wheel, else beside the package."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def list_recipes() -> tuple[str, ...]:
    """List the names of the recipes that ship, for example `digits` and `digits/1_pretrain`."""
    return tuple(sorted(_shipped()))


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """Find the file of a recipe.

    Args:
        name: a file, or a name of `list_recipes`.
        beside: folder that files are looked for in, instead of the current one; `.yaml` may then
            be left out. Steps of a pipeline name their recipes so.

    Raises:
        RecipeError: there is no such file and no such name.
    """
    files = [Path(name)] if beside is None else [beside / name, beside / f"{name}.yaml"]
    for file in files:
        if is_file(file):
            return file
    shipped = _shipped()
    plain = str(name).removesuffix(".yaml").removesuffix(f"/{_PIPELINE}")
    if plain in shipped:
        return shipped[plain]
    if _is_folder(files[0]):
        raise RecipeError(f"{show(str(name), 200)}: a folder; name a recipe file in it")
    near = nearest(plain, shipped)
    hint = f"did you mean '{near}'?" if near else "list them with: bigsimclr recipes ls"
    raise RecipeError(f"{show(str(name), 200)}: no such file and no recipe of that name; {hint}")


def is_file(path: Path) -> bool:
    """Say whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def run_name(name: str | Path) -> str:
    """Return what runs of a recipe are called: its name, or its file's."""
    if not is_file(Path(name)):
        return str(name).removesuffix(".yaml").removesuffix(f"/{_PIPELINE}")
    file = Path(name).resolve()
    return file.parent.name if file.stem == _PIPELINE else file.stem


def _shipped() -> dict[str, Path]:
    folder = recipes_folder()
    named = {}
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        named[name.removesuffix(f"/{_PIPELINE}")] = file
    return named
