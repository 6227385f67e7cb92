"""Documents: links lead somewhere, commands and recipes in them are real, nothing private."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import bigsimclr
from bigsimclr.recipe import find_recipe, is_pipeline, load_recipe, parse_overrides
from bigsimclr.recipe.explain import explain_all
from bigsimclr.recipe.pipeline import plan_pipeline
from bigsimclr.recipe.schema import PipelineRecipe
from tests.architecture.tree import (
    DOCUMENTS,
    PACKAGE,
    ROOT,
    dotted,
    functions,
    sources,
    written_files,
)

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What belongs to somebody's machine or to talk about the work, not to the project.
PRIVATE = [
    (re.compile(r"(?<![\w.])/(?:work|root|home|opt|mnt)/"), ()),
    (re.compile(r"(?<![\w.])/tmp/"), ("tests/",)),
    (re.compile(r"\.\./shared"), ("tests/golden/", "tests/data/")),
    (re.compile(r"\bissues? #?\d", re.IGNORECASE), ()),
    (re.compile(r"\bdesign/[A-Z]+\b|\b(?:PRODUCT|FIDELITY|RELIABILITY)\.md"), ()),
]


def _ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _blocks(language: str) -> list[tuple[str, str]]:
    return [
        (_ids(document), body)
        for document in DOCUMENTS
        for found, body in BLOCK.findall(document.read_text(encoding="utf-8"))
        if found == language
    ]


def _commands() -> list[tuple[str, str]]:
    return [
        (name, line.partition("  #")[0].strip())
        for name, body in _blocks("bash")
        for line in body.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_links_lead_to_files(document: Path) -> None:
    for text, target in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith(("https://", "#")):
            continue
        place = document.parent / target.partition("#")[0]
        assert place.exists(), f"[{text}]({target})"


def test_functions_named_in_the_tour_exist() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    named = re.findall(r"\[`([\w.]+)` in [^\]]*\]\(\.\./bigsimclr/([^)]+)\)", text)
    assert len(named) > 10
    for name, file in named:
        tree = sources()[file]
        known = {function for function, _ in functions(tree)}
        known |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert name in known, f"bigsimclr/{file} has no {name}"


@pytest.mark.parametrize("file", written_files(), ids=_ids)
def test_nothing_private(file: Path) -> None:
    name = _ids(file)
    if name == _ids(Path(__file__)):
        return
    text = file.read_bytes().decode(errors="replace")
    for pattern, allowed in PRIVATE:
        found = pattern.search(text)
        if found and not name.startswith(allowed or ("\0",)):
            line = text[: found.start()].count("\n") + 1
            pytest.fail(f"{name}:{line}: {found[0]!r}")


@pytest.mark.parametrize(("document", "line"), _commands())
def test_commands_are_real(document: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:.*## ", makefile, re.MULTILINE)
    elif words[:2] in (["bigsimclr", "run"], ["bigsimclr", "check"]):
        positional = [word for word in words[2:] if not word.startswith("-")]
        recipe, changes = positional[0], [word for word in positional[1:] if "=" in word]
        file = find_recipe(recipe) if recipe != "mine.yaml" else _own_recipe()
        loaded = load_recipe(file, () if is_pipeline(file) else changes)
        if isinstance(loaded, PipelineRecipe):
            plan_pipeline(
                loaded, source=file, overrides=parse_overrides(changes), directory=Path("run")
            )
    else:
        assert words[0] in {"bigsimclr", "pip", "git", "cd", ".venv/bin/bigsimclr", "source"}


def _own_recipe() -> Path:
    return find_recipe("digits/1_pretrain")


@pytest.mark.parametrize(("document", "body"), _blocks("yaml"))
def test_recipes_in_documents_load(document: str, body: str, tmp_path: Path) -> None:
    if not body.lstrip().startswith(("stage:", "#")):
        body = find_recipe("digits/1_pretrain").read_text(encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(body, encoding="utf-8")
    load_recipe(file)


@pytest.mark.parametrize(("document", "body"), _blocks("python"))
def test_python_in_documents_uses_public_names(document: str, body: str) -> None:
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.Attribute) and dotted(node).startswith("bsc."):
            assert dotted(node).split(".")[1] in bigsimclr.__all__, dotted(node)


def test_page_of_recipe_keys_is_fresh() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == explain_all(markdown=True) + "\n", "run `make docs`"


def test_version_has_an_entry_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert bigsimclr.__version__ in text


def test_readme_gives_the_two_commands() -> None:
    assert {("README.md", "make demo"), ("README.md", "make test")} <= set(_commands())


def test_package_has_no_unlinked_readers() -> None:
    assert (PACKAGE / "py.typed").exists()
