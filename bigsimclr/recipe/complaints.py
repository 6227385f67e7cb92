"""What pydantic found wrong, said plainly, at the place where it was written."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bigsimclr.recipe.keys import (
    STAGES,
    did_you_mean,
    dotted_keys,
    kind_of,
    nearest,
    same_ending,
    sections_in,
)
from bigsimclr.recipe.sections import Section
from bigsimclr.recipe.yaml_tree import Node, Problem, show

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
}
_YES_NO = ("yes", "no", "on", "off", "y", "n", "true", "false")


@dataclass(frozen=True)
class _Place:
    """Where an error belongs."""

    key: str  # dotted
    node: Node  # the deepest node that was written
    section: type[Section] | None  # the section that holds the last part of the key
    kinds: tuple[type[Section], ...]  # all that could stand in the section's place
    annotation: object  # what the schema says about the key
    is_choice: bool  # one of several types of value was tried


def complaints_about(error: ValidationError, root: Node, recipe: type[Section]) -> list[Problem]:
    """Turn pydantic's errors into lines.

    Args:
        error: of validating the tree.
        root: the tree.
        recipe: what it was validated as.
    """
    details = error.errors(include_url=False)
    located = [(detail, _blamed(detail, root, recipe)) for detail in details]
    failed = {place.key for _, place in located}
    misspelt = {_meant(place) for detail, place in located if detail["type"] == "extra_forbidden"}
    problems: dict[str, Problem] = {}
    for detail, place in located:
        # A list that lost its bad items only seems too short, a misspelt key only seems missing.
        is_echo = (
            any(key.startswith(f"{place.key}.") for key in failed)
            if detail["type"] == "too_short"
            else detail["type"] == "missing" and place.key in misspelt
        )
        is_rule = detail["type"] == "value_error"
        if place.node.broken or is_echo or (is_rule and _holds_broken(place.node)):
            continue
        problem = _one_too_many(place, detail) if is_rule else None
        if problem is None:
            text = _sentence(detail, place, recipe)
            if detail["type"] == "extra_forbidden":
                problem = _stray(place, text, root)
            else:
                problem = problem_at(place.node, place.key, text, root)
        # A value that fits none of several types is one mistake, however many types there are.
        same = place.key if place.is_choice else f"{place.key}: {problem.text}"
        problems.setdefault(same, problem)
    return list(problems.values())


def problem_at(node: Node, key: str, text: str, root: Node) -> Problem:
    """Say what is wrong with a key, naming the key unless the place it was written at does.

    Args:
        node: what was written.
        key: dotted.
        text: what is wrong.
        root: the tree, which knows the names of a pipeline's steps.
    """
    if key and not _names(node, key):
        text = f"{_spelled(key, root)}: {text}"
    return Problem(node.origin, node.line, text)


def _names(node: Node, key: str) -> bool:
    """Say whether the place where something was written ends in its key, as overrides do."""
    return node.line == 0 and node.origin.endswith((f" {key}", f".{key}"))


def _spelled(key: str, root: Node) -> str:
    first, *rest = key.split(".")
    steps = _below(root, "steps")
    if first != "steps" or not rest or not rest[0].isdecimal() or steps is None:
        return show(key, 120)
    # People count steps from 1 and know them by name.
    step = _below(steps, int(rest[0]))
    name = None if step is None else _below(step, "name")
    is_named = name is not None and isinstance(name.value, str) and rest[1:] != ["name"]
    who = f"step '{show(str(name.value))}'" if name and is_named else f"step {int(rest[0]) + 1}"
    return ": ".join([who, show(".".join(rest[1:]), 120)] if rest[1:] else [who])


def _stray(place: _Place, text: str, root: Node) -> Problem:
    """Place an unknown key; one on the way to an override's key is named by its word alone."""
    if place.node.origin.startswith("override ") and not _names(place.node, place.key):
        word = place.key.rpartition(".")[2]
        if f".{place.key}." in f".{place.node.origin.removeprefix('override ')}":
            text = f"unknown key '{show(word)}'{text.removeprefix('unknown key')}"
            return Problem(place.node.origin, place.node.line, text)
    return problem_at(place.node, place.key, text, root)


def _one_too_many(place: _Place, detail: ErrorDetails) -> Problem | None:
    """Say how an override adds to keys of which the recipe has one; None when it does not."""
    entries = place.node.value
    choices = sections_in(place.annotation)
    if len(choices) != 1 or not isinstance(entries, dict) or place.node.line == 0:
        return None
    one_of = [key for key in choices[0].one_of if key in entries]
    added = [key for key in one_of if entries[key].line == 0]
    if not added:
        return None
    node = entries[added[0]]
    others = [key for key in one_of if key not in added and entries[key].value is not None]
    if not others or node.value is None:
        return Problem(node.origin, 0, detail["msg"].removeprefix("Value error, "))
    remedy = "take it out there"
    if node.origin.startswith("override "):
        before = node.origin.removeprefix("override ").rpartition(".")[0]
        remedy = f"add {before}.{others[0]}=null"
    return Problem(node.origin, 0, f"the recipe sets {others[0]}; {remedy}")


def _blamed(detail: ErrorDetails, root: Node, recipe: type[Section]) -> _Place:
    place = _place(detail["loc"], root, recipe)
    kind = _below(place.node, "kind")
    if detail["type"] == "union_tag_invalid" and kind is not None:
        return replace(place, key=f"{place.key}.kind", node=kind)
    if detail["type"] == "missing" and kind is not None and kind.line == 0:
        return replace(place, node=kind)  # an override chose what needs the key
    return place


def _place(location: tuple[int | str, ...], root: Node, recipe: type[Section]) -> _Place:
    """Follow pydantic's location, which names kinds of sections besides keys, through the tree."""
    node = root
    annotation: object = recipe
    section: type[Section] | None = None
    kinds: tuple[type[Section], ...] = ()
    keys: list[str] = []
    is_choice = False
    for part in location:
        choices = sections_in(annotation)
        if get_origin(annotation) is tuple and _below(node, part) is None:
            break  # a list with too few values: the list is to blame
        if get_origin(annotation) in (tuple, dict):
            section, kinds = None, ()
            annotation = get_args(annotation)[-1 if isinstance(part, str) else 0]
        elif len(choices) > 1:
            annotation = next((c for c in choices if kind_of(c) == part), None)
            kinds = choices
            continue
        elif choices:
            kinds = kinds if choices[0] in kinds else ()
            section = choices[0]
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field else None
        else:
            is_choice = True
            break
        child = _below(node, part)
        keys.append(str(part))
        node = child if child is not None else node
    return _Place(".".join(keys), node, section, kinds, annotation, is_choice)


def _holds_broken(node: Node) -> bool:
    children = node.value.values() if isinstance(node.value, dict) else ()
    return any(child.broken for child in children)


def _below(node: Node, part: int | str) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(str(part))
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None


def _sentence(detail: ErrorDetails, place: _Place, recipe: type[Section]) -> str:
    match detail["type"]:
        case "extra_forbidden":
            text = _unknown_key(place, recipe)
        case "missing":
            text = _missing(place)
        case "union_tag_invalid" | "union_tag_not_found":
            text = _wrong_kind(place)
        case "value_error":
            text = detail["msg"].removeprefix("Value error, ")
        case _:
            text = _unfit_value(detail, place)
    return text


def _unfit_value(detail: ErrorDetails, place: _Place) -> str:
    """Say that a known key has a value of the wrong type or beyond its range."""
    kind = detail["type"]
    node = place.node
    if place.is_choice:
        return f"should be a number or text, not {_written(node)}"
    if kind in _WANTED:
        is_path = _takes_path(place.annotation)
        wanted = "a path" if kind == "string_type" and is_path else _WANTED[kind]
        return f"should be {wanted}, not {_written(node)}{_hint(kind, node)}"
    if kind == "string_pattern_mismatch":
        return f"{_written(node)} is no name; use a to z, 0 to 9 and _, at most 32, a letter first"
    message = detail["msg"].removeprefix("Input ")
    for noise in ("Tuple ", "String ", " after validation"):
        message = message.replace(noise, "")
    message = message.replace("at most 2 items", "2 values").replace(", not 0", "")
    if isinstance(node.value, dict | list):
        return message
    near = None
    if kind == "literal_error" and isinstance(node.value, str):
        near = nearest(node.value, _literals(place.annotation))
    return f"{message}, not {_written(node)}" + (f"; did you mean '{near}'?" if near else "")


def _takes_path(annotation: object) -> bool:
    return annotation is Path or any(map(_takes_path, get_args(annotation)))


def _meant(place: _Place) -> str | None:
    """Return the key that an unknown one is near to, dotted."""
    before, _, word = place.key.rpartition(".")
    near = nearest(word, place.section.model_fields) if place.section is not None else None
    return None if near is None else f"{before}.{near}".removeprefix(".")


def _unknown_key(place: _Place, recipe: type[Section]) -> str:
    if place.section is None:
        return "unknown key"
    *_, word = place.key.split(".")
    near = nearest(word, place.section.model_fields)
    if near:
        return f"unknown key; did you mean '{near}'?"
    others = [str(kind_of(kind)) for kind in place.kinds if word in kind.model_fields]
    if others:
        return f"unknown key for this kind; it belongs to {', '.join(others)}"
    elsewhere = same_ending(word, dotted_keys(recipe))
    if elsewhere:
        return f"unknown key; did you mean '{elsewhere}'?"
    stages = [stage for stage, other in STAGES.items() if word in other.model_fields]
    if place.section is recipe and stages:
        return f"unknown key for this stage; it belongs to {', '.join(stages)}"
    return f"unknown key; {did_you_mean(word, place.section.model_fields)}"


def _missing(place: _Place) -> str:
    if isinstance(place.node.value, list):
        return f"should have {len(get_args(place.annotation))} values, not {len(place.node.value)}"
    if place.section is None:
        return "a value is missing"
    *_, word = place.key.split(".")
    field = place.section.model_fields[word]
    meaning = " ".join((field.description or "").split()).partition(". ")[0].removesuffix(".")
    return f"the required key is missing; {meaning[:1].lower()}{meaning[1:]}"


def _wrong_kind(place: _Place) -> str:
    kinds = [kind for section in sections_in(place.annotation) if (kind := kind_of(section))]
    if isinstance(place.node.value, dict) and "kind" not in place.node.value:
        return f"the required key kind is missing; choose from {', '.join(kinds)}"
    if not place.key.endswith(".kind"):
        return f"should be a section with keys, not {_written(place.node)}"
    if not isinstance(place.node.value, str):
        return f"should be one of {', '.join(kinds)}, not {_written(place.node)}"
    return f"no kind '{show(place.node.value)}'; {did_you_mean(place.node.value, kinds)}"


def _literals(annotation: object) -> list[str]:
    found: list[str] = []
    for part in get_args(annotation):
        found += [part] if isinstance(part, str) else _literals(part)
    return found


def _written(node: Node) -> str:
    value = node.value
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"'{show(value)}'"
    return repr(value)


def _hint(kind: str, node: Node) -> str:
    """Say how to write what was probably meant; starts with a semicolon, or is empty."""
    value = node.value
    if kind == "bool_type":
        return "; write true or false" if str(value).lower() in _YES_NO else ""
    if kind in ("string_type", "path_type"):
        is_bare = isinstance(value, bool | int | float)
        return f'; put it in quotes: "{_written(node)}"' if is_bare else ""
    if kind == "int_type" and isinstance(value, float):
        return f"; write {int(value)}" if value.is_integer() and abs(value) < 2**53 else ""
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return _number_hint(value)
    return ""


def _number_hint(text: str) -> str:
    """Say how to write a number that was read as text."""
    plain = text.replace("_", "").replace(",", "").strip()
    body = plain.lstrip("+-")
    if not body.replace(".", "", 1).isascii() or not body[:1].isdigit():
        return ""
    if plain != text:
        return "; write it without separators and spaces"
    if body.startswith("0") and body.isdecimal() and len(body) > 1:
        return f"; write it without the leading zero: {body.lstrip('0') or '0'}"
    try:
        float(text)
    except ValueError:
        return ""
    return "; write it without quotes"
