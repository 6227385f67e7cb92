"""The list of steps for a GPU: one that fails or hangs does not stop the next."""

from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import PARTS, SECONDS, WORKERS, Step, run_all, suited

ROOT = Path(__file__).parents[1]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "writes.py").write_text("import sys; open(sys.argv[1], 'w').close()")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_steps_run_whatever_becomes_of_the_others(modules: Path) -> None:
    steps = [
        Step(60, ("fails", "now")),
        Step(1, ("hangs",)),
        Step(60, ("writes", "done")),
    ]
    outcomes = run_all(steps, 300, least=0.5)
    assert [(one.command, one.trouble) for one in outcomes] == [
        ("fails now", "exit status 3"),
        ("hangs", "stopped after 1 seconds"),
        ("writes done", ""),
    ]
    assert outcomes[1].seconds >= 1
    assert (modules / "done").exists()


def test_steps_without_time_left_are_not_begun(modules: Path) -> None:
    (outcome,) = run_all([Step(60, ("writes", "done"))], 5)
    assert outcome.trouble == "no time left"
    assert not (modules / "done").exists()


def test_tests_are_counted(modules: Path) -> None:
    (modules / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('number', [1, 2, 3])\n"
        "def test_small(number): assert number < 3\n"
        "def test_left_out(): pytest.skip('no reason')\n"
    )
    (outcome,) = run_all([Step(60, ("pytest", "-q", "test_some.py"))], 300)
    assert outcome.trouble == "exit status 1"
    assert outcome.counted == {"passed": 2, "failures": 1, "errors": 0, "skipped": 1}


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ((), []),
        (("xdist",), ["-n", str(WORKERS)]),
        (("xdist", "pytest_benchmark"), ["-n", str(WORKERS), "-p", "no:benchmark"]),
    ],
)
def test_tests_run_beside_each_other_where_they_can(
    installed: tuple[str, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: name if name in installed else None)
    assert suited() == expected


def test_every_test_for_a_gpu_has_its_turn() -> None:
    steps = [step for part in PARTS.values() for step in part if step.words[0] == "pytest"]
    paths = {ROOT / word for step in steps for word in step.words if word.startswith("tests/")}
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    own = Path(__file__).resolve()
    assert len(files) > 10
    for file in files:
        assert file == own or paths & {file, *file.parents}, file


def test_results_have_names_of_their_own() -> None:
    steps = [step for part in PARTS.values() for step in part]
    outputs = [word for step in steps for word in step.words if word.endswith(".json")]
    assert len(outputs) == len(set(outputs)) == 20
    assert all(name.startswith("benchmarks/results/") for name in outputs)
    assert all(name.endswith("-gpu.json") for name in outputs)
    assert all(step.seconds < SECONDS for step in steps)


@pytest.mark.parametrize("part", PARTS)
def test_all_commands_are_understood(part: str) -> None:
    """Every option is one of its program, and every path is there."""
    for step in PARTS[part]:
        module, *words = step.words
        if module == "pytest":
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
            continue
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        options = [word for word in words if word.startswith("--")]
        assert all(f'"{option}"' in source for option in options), step.words
