"""From YAML text and `key=value` overrides to a recipe, with every mistake at once.

Each mistake is one line: `file:line: dotted.key: what; what to do`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import yaml
from pydantic import ValidationError

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.complaints import complaints_about, problem_at
from bigsimclr.recipe.keys import STAGES, did_you_mean
from bigsimclr.recipe.names import find_recipe
from bigsimclr.recipe.plan import rule_breaches
from bigsimclr.recipe.schema import PipelineRecipe, Recipe
from bigsimclr.recipe.sections import Section
from bigsimclr.recipe.steps import step_breaches
from bigsimclr.recipe.yaml_tree import (
    MAX_BYTES,
    Node,
    Problem,
    TreeReading,
    Value,
    decode,
    is_plain_text,
    read_tree,
    read_value,
    show,
)

S = TypeVar("S", bound=Section)

MAX_LINES = 50  # mistakes that are spelled out

Overrides = Mapping[str, object] | Sequence[str]
"""Dotted keys with values, or `key=value` texts whose values are read as YAML."""


def load_recipe(source: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a recipe file, or a name that `bigsimclr recipes` lists.
        overrides: keys to replace or add, as `{"schedule.epochs": 5}` or `["schedule.epochs=5"]`.

    Raises:
        RecipeError: the recipe cannot be used; one line per mistake, each with file and line.
    """
    path = find_recipe(source)
    return parse_recipe(_text_of(path), name=str(path), overrides=overrides)


def load_section(path: Path, section: type[S], overrides: Overrides = ()) -> S:
    """Read any file of keys as strictly as a recipe.

    Args:
        path: the file.
        section: what it holds.
        overrides: as for `load_recipe`.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    reading = read_tree(_text_of(path), str(path))
    problems = list(reading.problems)
    for key, value in _override_nodes(overrides, problems):
        _insert(reading.root, key, value, problems)
    try:
        found = section.model_validate_json(json.dumps(plain_value(reading.root)))
    except ValidationError as error:
        problems.extend(complaints_about(error, reading.root, section))
        raise refusal(_lines(problems)) from None
    if problems:
        raise refusal(_lines(problems))
    return found


def try_recipe(
    path: Path, overrides: Sequence[tuple[str, Node]]
) -> tuple[Recipe | None, list[str]]:
    """Read a recipe file; return it, or None and a line for each mistake.

    Args:
        path: the file.
        overrides: keys to replace or add; the nodes say where they were written.
    """
    try:
        reading = read_tree(_text_of(path), str(path))
    except RecipeError as error:
        return None, [str(error)]
    recipe = _checked(reading, overrides, problems := list(reading.problems))
    return recipe, _lines(problems)


def tree_of(source: Path) -> Node:
    """Return what a recipe file holds, with lines; a file that cannot be read is an empty one."""
    try:
        return read_tree(_text_of(source), str(source)).root
    except RecipeError:
        return Node({}, str(source), 0)


def is_pipeline(source: str | Path) -> bool:
    """Say whether a recipe is a pipeline, whose overrides are for its steps.

    Args:
        source: as for `load_recipe`.

    Raises:
        RecipeError: the file is no YAML.
    """
    return stage_of(source) == "pipeline"


def stage_of(source: str | Path) -> str | None:
    """Return what stands at `stage`, with nothing else of the recipe checked.

    Args:
        source: as for `load_recipe`.

    Raises:
        RecipeError: the file is no YAML.
    """
    path = find_recipe(source)
    root = read_tree(_text_of(path), str(path)).root
    stage = root.value.get("stage") if isinstance(root.value, dict) else None
    return stage.value if stage is not None and isinstance(stage.value, str) else None


def _text_of(path: Path) -> str:
    try:
        # One byte more than allowed says enough, even of an endless file.
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{show(str(path), 200)}: {error.strerror}") from None
    return decode(data, str(path))


def parse_recipe(text: str, *, name: str = "recipe", overrides: Overrides = ()) -> Recipe:
    """Read a recipe from text.

    Args:
        text: YAML.
        name: how messages call it.
        overrides: as for `load_recipe`.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    reading = read_tree(text, name)
    problems = list(reading.problems)
    nodes = _override_nodes(overrides, problems)
    recipe = _checked(reading, nodes, problems)
    if recipe is None:
        raise refusal(_lines(problems))
    return recipe


def _checked(
    reading: TreeReading, overrides: Sequence[tuple[str, Node]], problems: list[Problem]
) -> Recipe | None:
    """Make the recipe, adding to the problems; None when there are any."""
    root = reading.root
    if not isinstance(root.value, dict):
        what = "a list" if isinstance(root.value, list) else "a single value"
        text = f"a recipe is made of 'key: value' lines, and this is {what}; start with stage:"
        problems.append(Problem(root.origin, root.line, text))
        return None
    for key, value in overrides:
        _insert(root, key, value, problems)
    recipe = _validated(root, problems)
    return None if problems else recipe


def recipe_text(recipe: Recipe) -> str:
    """Write a recipe as YAML with every key and default spelled out; it reads back equal."""
    values = recipe.model_dump(mode="json")
    ordered = {"stage": values.pop("stage"), **values}
    return yaml.dump(
        ordered,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe to a file, resolved: every key and default spelled out."""
    Path(path).write_text(recipe_text(recipe), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes only what the strict reader takes back as the same value."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML decides by YAML 1.1, where 1e5 is text and needs no quotes.
    style = None if is_plain_text(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _validated(root: Node, problems: list[Problem]) -> Recipe | None:
    """Check the tree against the schema, adding to the problems; None when it does not fit."""
    entries = root.value
    stage = entries.get("stage") if isinstance(entries, dict) else None
    if stage is None:
        choices = ", ".join(STAGES)
        text = f"stage: the required key is missing; choose from {choices}"
        problems.append(Problem(root.origin, root.line, text))
        return None
    if not isinstance(stage.value, str) or stage.value not in STAGES:
        if not stage.broken:
            word = show(str(plain_value(stage)))
            text = f"stage: no stage '{word}'; {did_you_mean(word, STAGES)}"
            problems.append(Problem(stage.origin, stage.line, text))
        return None
    section = STAGES[stage.value]
    try:
        # By way of JSON: strict checks of Python objects would refuse text for a path.
        recipe = cast("Recipe", section.model_validate_json(json.dumps(plain_value(root))))
    except ValidationError as error:
        problems.extend(complaints_about(error, root, section))
        return None
    if isinstance(recipe, PipelineRecipe):
        breaches = step_breaches(recipe)
    else:
        breaches = rule_breaches(recipe)
    for key, message in breaches:
        problems.append(problem_at(deepest(root, key.split(".")), key, message, root))
    return recipe


def plain_value(node: Node) -> object:
    """Return what a node holds as plain JSON values."""
    if isinstance(node.value, dict):
        return {key: plain_value(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain_value(child) for child in node.value]
    return node.value


def deepest(root: Node, parts: Sequence[str]) -> Node:
    """Follow keys and positions in lists as far as the tree goes."""
    node = root
    for part in parts:
        child = _child(node, part)
        if child is None:
            break
        node = child
    return node


def parse_overrides(texts: Sequence[str]) -> dict[str, object]:
    """Read `key=value` texts.

    Args:
        texts: dotted keys with values written as YAML.

    Raises:
        RecipeError: one of them cannot be read; one line per mistake.
    """
    problems: list[Problem] = []
    nodes = _override_nodes(texts, problems)
    if problems:
        raise refusal(_lines(problems))
    return {key: plain_value(node) for key, node in nodes}


def _override_nodes(overrides: Overrides, problems: list[Problem]) -> list[tuple[str, Node]]:
    """Turn overrides into nodes; what cannot be read is added to the problems."""
    nodes: dict[str, Node] = {}
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            nodes[key] = node_of(value, f"override {show(key)}")
        return list(nodes.items())
    if isinstance(overrides, str):
        raise TypeError("overrides are a list of key=value texts, not one text")
    for text in overrides:
        key, equals, written = text.partition("=")
        key = key.strip()
        origin = f"override {show(key)}"
        if not equals or not all(key.split(".")):
            problems.append(Problem(f"override '{show(text)}'", 0, "write it as key=value"))
        elif key in nodes:
            problems.append(Problem(origin, 0, "is given twice; keep one"))
        else:
            try:
                reading = read_value(written, origin)
            except RecipeError as error:
                problems.append(Problem(origin, 0, str(error).removeprefix(f"{origin}: ")))
                continue
            problems.extend(reading.problems)
            nodes[key] = reading.root
    return list(nodes.items())


def node_of(value: object, origin: str) -> Node:
    """Turn a Python value into a node.

    Args:
        value: plain; a path becomes text.
        origin: how messages call the place where it was written.

    Raises:
        RecipeError: the value is none that YAML could write.
    """
    made: Value
    if isinstance(value, Mapping):
        made = {str(key): node_of(item, origin) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        made = [node_of(item, origin) for item in value]
    elif isinstance(value, Path):
        made = str(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{origin}: {value} is not a finite number")
    elif value is None or isinstance(value, str | bool | int | float):
        made = value
    else:
        raise RecipeError(f"{origin}: a {type(value).__name__} is no value of a recipe")
    return Node(made, origin, 0, quoted=isinstance(made, str))


def _insert(root: Node, key: str, value: Node, problems: list[Problem]) -> None:
    """Put a value at a dotted key, making the sections on the way; numbers are list positions."""
    node = root
    *sections, last = key.split(".")
    for part in sections:
        child = _child(node, part)
        if child is None or child.value is None:
            child = Node({}, value.origin, 0)
            if not _put(node, part, child, problems):
                return
        node = child
    _put(node, last, value, problems)


def _child(node: Node, part: str) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(part)
    if isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
        return node.value[int(part)]
    return None


def _put(node: Node, part: str, value: Node, problems: list[Problem]) -> bool:
    if isinstance(node.value, dict):
        node.value[part] = value
        return True
    if isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
        node.value[int(part)] = value
        return True
    holder = "a list" if isinstance(node.value, list) else "no section"
    text = f"cannot be set: {node.origin} holds {holder}, so there is no '{show(part)}' in it"
    problems.append(Problem(value.origin, 0, text))
    return False


def _lines(problems: Sequence[Problem]) -> list[str]:
    in_order = sorted(problems, key=lambda problem: problem.line)
    return [show(f"{p.origin}: {p.text}", 1000) for p in in_order]


def refusal(lines: Sequence[str]) -> RecipeError:
    """Return one error for all mistakes, each of them spelled out once."""
    different = list(dict.fromkeys(lines))
    if len(different) == 1:
        return RecipeError(different[0])
    shown = different[:MAX_LINES]
    if len(different) > MAX_LINES:
        shown.append(f"and {len(different) - MAX_LINES} more")
    return RecipeError("\n".join([*shown, f"{len(different)} errors, nothing was started."]))
