"""Files and functions stay small enough to read in one go."""

import ast

import pytest

from tests.architecture.tree import PACKAGE, ROOT, functions, lines_of, sources

LONGEST_DOCUMENTS = {"README.md": 149, "CONTRIBUTING.md": 80, "docs/tour.md": 200}


@pytest.mark.parametrize("name", sources())
def test_files_have_fewer_than_400_lines(name: str) -> None:
    assert len(lines_of(name)) < 400


@pytest.mark.parametrize("name", sources())
def test_functions_have_fewer_than_60_lines(name: str) -> None:
    for function, node in functions(sources()[name]):
        length = (node.end_lineno or 0) - node.lineno + 1
        documentation = _documentation_lines(node)
        assert length - documentation < 60, (
            f"{PACKAGE / name}:{node.lineno}: {function} has {length} lines, "
            f"{documentation} of them documentation"
        )


def _documentation_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return 0
    return (first.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("name", LONGEST_DOCUMENTS)
def test_documents_are_short(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_DOCUMENTS[name]


def test_decisions_are_short_and_numbered_without_gaps() -> None:
    files = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [file.name[:3] for file in files] == [f"{n:03d}" for n in range(1, len(files) + 1)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 30, file
        for part in ("Date: ", "## Context", "## Decision", "## Consequences"):
            assert part in text, f"{file} lacks {part!r}"
