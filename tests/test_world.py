"""How a process is set up for its device."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from bigsimclr.world import Job, own_job

# Page faults of three rounds of four tensors of 24 MB, after three rounds before.
FAULTS = """
import resource, torch
from bigsimclr.world import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        [torch.ones(6_000_000) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes these settings")
@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is changed beside a GPU")
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_freed_memory_is_used_again_unless_the_environment_decides(told: dict[str, str]) -> None:
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(names)} | told
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    pages = 12 * 24_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) > 0.5 * pages) == bool(told)
    assert (int(done.stdout) < 0.1 * pages) != bool(told)


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"JOB_ID": "123"}, Job("123", 0)),
        ({"JOB_ID": "123", "RESTART_COUNT": "2"}, Job("123", 2)),
        ({"JOB_ID": "123", "RESTART_COUNT": "many"}, Job("123", 0)),
        (
            {"JOB_ID": "15", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "1"},
            Job("12_3", 1),
        ),
        ({"JOB_ID": "15", "ARRAY_JOB_ID": "12"}, Job("15", 0)),
        ({"RESTART_COUNT": "1"}, None),
    ],
)
def test_the_job_is_the_one_that_slurm_tells(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], job: Job | None
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert own_job() == job
