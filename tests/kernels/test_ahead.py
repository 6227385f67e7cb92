"""Every kernel compiles for the GPUs it is meant for, and no register is spilled to memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILDS = sorted(file.stem for file in (Path(__file__).parent / "builds").glob("[a-z]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_build_without_spills(name: str) -> None:
    # A process of its own: where there is no GPU, this one interprets.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead", name],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert {build["capability"] for build in builds} == {80, 90}
    assert all(build["spilled_bytes"] == 0 for build in builds), done.stdout
    assert all(0 < build["registers"] <= 255 for build in builds)
