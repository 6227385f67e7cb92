"""The page on fidelity: its rows name official lines, a decision, our code and tests, all real."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.tree import PACKAGE, ROOT, functions

PAGE = ROOT / "docs" / "faithful.md"
TESTS = ROOT / "tests"
HEADER = ["Official code", "Where", "Here", "Code", "Test"]
DECISIONS = {"follow", "leave", "option"}
# Lines of the official files at commit 383d414.
OFFICIAL_LINES = {
    "README.md": 225,
    "colabs/distillation_self_training.ipynb": 1007,
    "colabs/load_and_inference.ipynb": 1136,
    "data.py": 165,
    "data_util.py": 519,
    "lars_optimizer.py": 161,
    "model.py": 225,
    "model_util.py": 187,
    "objective.py": 124,
    "resnet.py": 706,
    "run.py": 450,
    "tf2/colabs/distillation_self_training.ipynb": 1069,
    "tf2/colabs/imagenet_results.ipynb": 684,
    "tf2/data.py": 115,
    "tf2/data_util.py": 518,
    "tf2/lars_optimizer.py": 169,
    "tf2/metrics.py": 74,
    "tf2/model.py": 280,
    "tf2/objective.py": 127,
    "tf2/resnet.py": 747,
    "tf2/run.py": 671,
}


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if row != HEADER and set(row) != {"---"}]


ROWS = _rows()
every_row = pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))


def _quoted(cell: str) -> list[str]:
    """Take apart a cell in which everything stands in backquotes."""
    found = re.findall(r"`([^`]+)`", cell)
    assert found
    assert cell == " ".join(f"`{item}`" for item in found)
    return found


@cache
def _functions_of(file: Path) -> set[str]:
    return {name for name, _ in functions(ast.parse(file.read_text(encoding="utf-8")))}


def test_the_page_has_a_row_for_every_point() -> None:
    assert len(ROWS) > 70
    assert {len(row) for row in ROWS} == {len(HEADER)}
    points = [row[0] for row in ROWS]
    assert len(points) == len(set(points))


@every_row
def test_official_lines_exist(row: list[str]) -> None:
    for reference in _quoted(row[1]):
        found = re.fullmatch(r"([\w/]+\.\w+):([1-9]\d*)(?:-([1-9]\d*))?", reference)
        assert found, reference
        first, last = int(found[2]), int(found[3] or found[2])
        assert first < last or found[3] is None, reference
        assert last <= OFFICIAL_LINES[found[1]], reference


@every_row
def test_decisions_are_one_of_three(row: list[str]) -> None:
    words = re.findall(r"\*\*(\w+)\*\*", row[2])
    assert row[2].startswith("**")
    assert set(words) <= DECISIONS


@every_row
def test_our_files_exist(row: list[str]) -> None:
    for file in _quoted(row[3]):
        assert (PACKAGE / file).is_file(), file


@every_row
def test_tests_exist(row: list[str]) -> None:
    for reference in _quoted(row[4]):
        file, _, name = reference.partition("::")
        assert (TESTS / file).is_file(), reference
        assert name.startswith("test_"), reference
        assert name in _functions_of(TESTS / file), reference


def test_no_official_file_is_listed_in_vain() -> None:
    named = {reference.partition(":")[0] for row in ROWS for reference in _quoted(row[1])}
    assert named == OFFICIAL_LINES.keys()


def test_every_file_of_golden_tests_holds_a_point() -> None:
    named = {reference.partition("::")[0] for row in ROWS for reference in _quoted(row[4])}
    files = {file.relative_to(TESTS).as_posix() for file in (TESTS / "golden").glob("test_*.py")}
    assert files <= named
