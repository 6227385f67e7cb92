"""The schema as a tree to walk: which sections a key may hold, and which key was meant."""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from typing import get_args

from bigsimclr.recipe.schema import Recipe
from bigsimclr.recipe.sections import Section

STAGES: dict[str, type[Section]] = {
    get_args(recipe.model_fields["stage"].annotation)[0]: recipe for recipe in get_args(Recipe)
}
"""Every value of `stage` with the recipe it selects."""

# Other words for keys and values, too unlike them to be found by their letters.
_ALIASES = {
    "batch_size": "global_batch",
    "bs": "global_batch",
    "gpu": "cuda",
    "lr": "learning_rate",
    "tau": "temperature",
    "temp": "temperature",
    "wd": "weight_decay",
}
# Below this, words of a few letters resemble anything: gpu and cpu, steps and stage.
_LIKENESS = 0.7


def sections_in(annotation: object) -> tuple[type[Section], ...]:
    """List the sections an annotation may hold, in the order they are declared."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    return tuple(itertools.chain.from_iterable(map(sections_in, get_args(annotation))))


def kind_of(section: type[Section]) -> str | None:
    """Return the value of `kind` that selects a section, None where nothing has to be selected."""
    field = section.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def dotted_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Walk over all keys below a section, those of every kind included; some come twice."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from dotted_keys(inner, f"{prefix}{name}.")


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that was probably meant, None when nothing comes close."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    written = word.lower()[:100]
    alias = _ALIASES.get(written)
    if alias in by_lower and written not in by_lower:
        return by_lower[alias]
    found = difflib.get_close_matches(written, by_lower, n=1, cutoff=_LIKENESS)
    return by_lower[found[0]] if found else None


def same_ending(key: str, candidates: Iterable[str]) -> str | None:
    """Return the dotted key with the same last part, the likest where there are several."""
    names = list(dict.fromkeys(candidates))
    last = key.rpartition(".")[2]
    for word in (last, _ALIASES.get(last.lower())):
        same = [name for name in names if name.rpartition(".")[2] == word]
        if same:
            return max(same, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    return None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return the end of a message: the nearest candidate, or all of them."""
    names = list(dict.fromkeys(candidates))
    near = nearest(word, names)
    return f"did you mean '{near}'?" if near else f"choose from {', '.join(names)}"
