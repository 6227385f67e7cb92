"""What every key means: the schema's own words, for people and for editors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, cast

from pydantic import Field, TypeAdapter
from pydantic.fields import FieldInfo

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.keys import STAGES, kind_of, nearest, same_ending, sections_in
from bigsimclr.recipe.schema import Recipe
from bigsimclr.recipe.sections import Section
from bigsimclr.recipe.yaml_tree import show

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "section",
}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True)
class KeyFacts:
    """What there is to know about one key, in one of its meanings."""

    key: str  # dotted
    type: str  # with the allowed range
    default: str | None  # as YAML; None: the key is required
    text: str  # documentation
    kinds: tuple[str, ...]  # such as "optimizer.kind: lars"; empty when no kind decides
    stages: tuple[str, ...]


def all_keys() -> list[KeyFacts]:
    """List every key of every stage; a key with several meanings comes once per meaning."""
    merged: dict[tuple[str, str, str | None, str], tuple[list[str], list[str]]] = {}
    for stage, recipe in STAGES.items():
        for facts in _walk(recipe, "", ()):
            identity = (facts.key, facts.type, facts.default, facts.text)
            kinds, stages = merged.setdefault(identity, ([], []))
            kinds += [kind for kind in facts.kinds if kind not in kinds]
            stages += [stage] if stage not in stages else []
    found = [KeyFacts(*key, tuple(kinds), tuple(stages)) for key, (kinds, stages) in merged.items()]
    place = {key: number for number, key in enumerate(dict.fromkeys(f.key for f in found))}
    return sorted(found, key=lambda facts: place[facts.key])


def explain(key: str) -> str:
    """Say what a key means, its type, range, default and the stages that have it.

    Args:
        key: dotted, for example `loss.temperature`; a section lists its keys.

    Raises:
        RecipeError: there is no such key.
    """
    everything = all_keys()
    meanings = [facts for facts in everything if facts.key == key]
    if not meanings:
        names = list(dict.fromkeys(facts.key for facts in everything))
        last = key.rpartition(".")[2]
        same_end = [name for name in names if name.rpartition(".")[2] == last]
        if same_end:
            hint = f"did you mean {' or '.join(repr(name) for name in same_end[:4])}?"
        else:
            near = same_ending(key, names) or nearest(key, names)
            hint = f"did you mean '{near}'?" if near else "all keys: bigsimclr explain --all"
        raise RecipeError(f"no key '{show(key)}'; {hint}")
    lines = [line for facts in meanings for line in _as_lines(facts)]
    below = dict.fromkeys(f.key for f in everything if f.key.rpartition(".")[0] == key)
    if below:
        lines += ["", "keys:", *(f"  {name}" for name in below)]
    return "\n".join(lines)


def explain_all(*, markdown: bool = False) -> str:
    """Say what every key means, as plain text or as the Markdown page of the documentation."""
    everything = all_keys()
    if not markdown:
        return "\n\n".join("\n".join(_as_lines(facts)) for facts in everything)
    groups: dict[str, list[KeyFacts]] = {}
    for facts in everything:
        groups.setdefault(facts.key.rpartition(".")[0], []).append(facts)
    stages = [f"| `{name}` | {_doc(recipe)} |" for name, recipe in STAGES.items()]
    lines = [
        "# Recipe keys",
        "",
        "Made by `bigsimclr explain --all --markdown`; do not edit.",
        "",
        "| `stage` | meaning |",
        "|---|---|",
        *stages,
    ]
    for name, members in groups.items():
        lines += ["", f"## {f'`{name}`' if name else 'Top level'}", ""]
        lines += ["| key | value | default | meaning | stages |", "|---|---|---|---|---|"]
        lines += [_as_row(facts) for facts in members if facts.key != "stage"]
    return "\n".join(lines)


def recipe_schema() -> dict[str, object]:
    """Return the JSON Schema of a recipe, for editors that complete and check YAML."""
    adapter: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="stage")])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bigsimclr recipe",
        **adapter.json_schema(),
    }


def _walk(
    section: type[Section],
    prefix: str,
    kinds: tuple[str, ...],
    around: frozenset[type[Section]] = frozenset(),
) -> Iterator[KeyFacts]:
    """Yield the keys below a section; those of sections that could stand `around` it come there."""
    properties = cast("dict[str, dict[str, object]]", section.model_json_schema()["properties"])
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        key = prefix + name
        shape = "section" if inner else _shape(properties[name])
        if len(inner) > 1:
            shape = "section, kind: " + " or ".join(str(kind_of(choice)) for choice in inner)
        text = " ".join((field.description or "").split())
        yield KeyFacts(key, shape, _default(field), text, kinds, ())
        for choice in inner:
            if choice in around:
                continue
            chosen = (f"{key}.kind: {kind_of(choice)}",) if len(inner) > 1 else kinds
            yield from _walk(choice, f"{key}.", chosen, around | set(inner))


def _shape(schema: dict[str, object]) -> str:
    """Put a key's JSON Schema into words."""
    choices = cast("list[dict[str, object]]", schema.get("anyOf", []))
    if choices:
        return " or ".join(_shape(choice) for choice in choices)
    values = cast(
        "list[object]", schema.get("enum", [schema["const"]] if "const" in schema else [])
    )
    if values:
        return " or ".join(str(value) for value in values)
    if schema.get("type") == "array":
        items = cast("list[dict[str, object]]", schema.get("prefixItems", []))
        if items:
            return f"[{', '.join(_shape(item) for item in items)}]"
        return f"list of {_shape(cast('dict[str, object]', schema['items']))}"
    if schema.get("type") == "object":
        values_of = cast("dict[str, object]", schema["additionalProperties"])
        return f"keys, each with a {_shape(values_of)}"
    name = "path" if schema.get("format") == "path" else _TYPES[str(schema["type"])]
    limits = [f"{sign} {schema[limit]:g}" for limit, sign in _LIMITS.items() if limit in schema]
    return " ".join([name, " and ".join(limits)]).strip()


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    if isinstance(field.default, Section):
        changed = field.default.model_dump(mode="json", exclude_defaults=True)
        return f"{{{', '.join(f'{k}: {json.dumps(v)}' for k, v in changed.items())}}}"
    if isinstance(field.default, str):
        return field.default
    return json.dumps(field.default)


def _doc(section: type[Section]) -> str:
    return (section.__doc__ or "").split("\n")[0]


def _as_lines(facts: KeyFacts) -> list[str]:
    default = "required" if facts.default is None else f"default {facts.default}"
    lines = [f"{facts.key}: {facts.type}; {default}", f"  {facts.text}"]
    if facts.kinds:
        lines.append(f"  with {', '.join(facts.kinds)}")
    lines.append(f"  stages: {', '.join(facts.stages)}")
    return lines


def _as_row(facts: KeyFacts) -> str:
    meaning = facts.text.replace("|", "\\|")
    if facts.kinds:
        meaning += f" ({', '.join(kind.rpartition('.')[2] for kind in facts.kinds)})"
    default = "required" if facts.default is None else f"`{facts.default}`"
    stages = "all" if len(facts.stages) >= len(STAGES) - 1 else ", ".join(facts.stages)
    short = facts.key.rpartition(".")[2]
    return f"| `{short}` | {facts.type} | {default} | {meaning} | {stages} |"
