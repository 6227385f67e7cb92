"""A run that is killed and stopped again and again becomes what it would have become."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--queue"]])
def test_a_storm_changes_nothing(tmp_path: Path, options: list[str]) -> None:
    output = tmp_path / "storm.json"
    blows = ["--kills", "3", "--terms", "2", "--steps", "20", "-o", str(output)]
    # A process of its own: the harness forks, and must not have computed anything before.
    command = [sys.executable, "-m", "benchmarks.storm", *blows, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr
    found = json.loads(output.read_text())
    assert (found["kills"], found["terms"]) == (3, 2)
    assert found["checkpoints_damaged"] == 0
    assert found["checkpoints_gone"] == 0
    assert max(found["steps_lost_to_kills"]) <= 2
    assert found["steps_lost_to_terms"] == [0, 0]
    assert found["state_bitwise_equal"] == found["losses_equal"] == found["runs"] >= 1
    assert found["unexpected_exits"] == []
    assert done.returncode == 0
