"""Every key of every section is read by some code, so that no key can be without effect."""

import ast

import pytest

from bigsimclr.launch.profile import ContainerSection, Profile
from bigsimclr.recipe import schema, sections, sources as data_sources
from bigsimclr.recipe.sections import Section
from tests.architecture.tree import sources

SECTIONS = [
    section
    for section in {**vars(sections), **vars(data_sources), **vars(schema)}.values()
    if isinstance(section, type) and issubclass(section, Section) and section is not Section
]
PROFILES = [Profile, ContainerSection]


def _read_names() -> set[str]:
    """Collect attributes read, and keys matched by patterns, outside the schema."""
    found = set()
    for name, tree in sources().items():
        if name in ("recipe/schema.py", "recipe/sections.py", "recipe/sources.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                found |= set(node.kwd_attrs)
    return found


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_read(section: type[Section]) -> None:
    # Which section stands in a union is told by its type; `kind` and `stage` choose it.
    unread = section.model_fields.keys() - _read_names() - {"kind", "stage"}
    assert not unread, f"no code reads {sorted(unread)} of {section.__name__}"


def _names_read_for_jobs() -> set[str]:
    """Collect attributes read where jobs are made and run; what only checks a key reads none."""
    found = set()
    for name, tree in sources("launch", "checking/allocation.py").items():
        checks = {"_fits"} if name == "launch/profile.py" else set()
        skipped = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name in checks
            for inner in ast.walk(node)
        }
        found |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and node not in skipped
        }
    return found


@pytest.mark.parametrize("section", PROFILES, ids=lambda section: section.__name__)
def test_every_key_of_a_profile_is_read(section: type[Section]) -> None:
    unread = section.model_fields.keys() - _names_read_for_jobs()
    assert not unread, f"no code reads {sorted(unread)} of {section.__name__}"


@pytest.mark.parametrize("section", [*SECTIONS, *PROFILES], ids=lambda section: section.__name__)
def test_every_key_is_documented(section: type[Section]) -> None:
    for key, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{key}"
        assert field.description.rstrip().endswith((".", ")")), f"{section.__name__}.{key}"
