"""How benchmarks.sanitize finds the program, runs tests under it and reads what it says."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.kernel_classes import OURS
from benchmarks.sanitize import TESTS, TOOLS, command_of, find_program, judge, watch

ROOT = Path(__file__).parents[1]
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
}
BAD = {
    "memcheck": "Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 3 errors",
    "racecheck": "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_findings(tool: str) -> None:
    fine = judge(tool, "test_lars", 0, f"========= {CLEAN[tool]}\n", "8 passed in 3 s", seconds=1)
    assert (fine.outcome, fine.errors, fine.passed, fine.said) == ("clean", 0, 8, [])
    bad = judge(tool, "test_lars", 99, BAD[tool], "8 passed in 3 s", seconds=1)
    assert bad.outcome == "errors"
    assert bad.errors == {"memcheck": 3, "racecheck": 2}[tool]
    assert bad.said[0] == BAD[tool].splitlines()[0]
    wrong = judge(tool, "test_lars", 1, CLEAN[tool], "1 failed, 7 passed in 3 s", seconds=1)
    assert (wrong.outcome, wrong.passed) == ("tests failed", 7)
    assert judge(tool, "test_lars", 0, CLEAN[tool], "no tests ran", seconds=1).outcome == (
        "tests failed"
    )
    assert judge(tool, "test_lars", None, "", "..", seconds=1).outcome == "stopped"
    assert judge(tool, "test_lars", 1, "Device not supported", "", seconds=1).outcome == (
        "no summary"
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_a_program_in_its_place_is_run(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    log = '"$(echo "$@" | sed "s/.*--log-file \\([^ ]*\\).*/\\1/")"'
    program.write_text(f"#!/bin/sh\necho '= {CLEAN[tool]}' > {log}\necho 3 passed\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = find_program()
    assert found == str(program)
    assert watch(found, tool, "test_lars", 60).outcome == "clean"
    program.write_text("#!/bin/sh\nsleep 60\n")
    assert watch(found, tool, "test_lars", 0.5).outcome == "stopped"


def test_the_wheel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    specification = importlib.util.spec_from_loader("nvidia", None)
    assert specification is not None
    specification.submodule_search_locations = [str(tmp_path / "nvidia")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: specification)
    assert find_program() in (str(program), "/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.parametrize("tests", TESTS)
def test_the_tests_exist(tests: str, tmp_path: Path) -> None:
    command = command_of("compute-sanitizer", "memcheck", tests, tmp_path / "log")
    assert [word for word in command if word.startswith("kernel_name=")] == [
        f"kernel_name={name}" for name in OURS
    ]
    (file,) = (ROOT / word for word in command if word.startswith("tests/"))
    names = {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    for word in re.findall(r"test_\w+", command[command.index("-k") + 1]):
        assert any(name.startswith(word) for name in names), word
