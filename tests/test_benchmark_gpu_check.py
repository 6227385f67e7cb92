"""The list of steps for a GPU: one that fails or hangs does not stop the next."""

from pathlib import Path

import pytest

from benchmarks.gpu_check import SECONDS, STEPS, Step, run_all


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
    assert run_all(steps, 300, least=0.5) == [
        "fails now: exit status 3",
        "hangs: stopped after 1 seconds",
    ]
    assert (modules / "done").exists()


def test_steps_without_time_left_are_not_begun(modules: Path) -> None:
    assert run_all([Step(60, ("writes", "done"))], 5) == ["writes done: no time left"]
    assert not (modules / "done").exists()


def test_results_have_names_of_their_own() -> None:
    outputs = [word for step in STEPS for word in step.words if word.endswith(".json")]
    assert len(outputs) == len(set(outputs)) == 10
    assert all(name.startswith("benchmarks/results/") for name in outputs)
    assert all(name.endswith("-gpu.json") for name in outputs)
    assert all(step.seconds < SECONDS for step in STEPS)
