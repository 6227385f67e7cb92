"""How a process is set up for its device."""

import os
import platform
import subprocess
import sys

import pytest
import torch

# Page faults of ten rounds of four tensors of 24 MB, after ten rounds before.
FAULTS = """
import resource, torch
from bigsimclr.world import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
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
    pages = 40 * 24_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) > 0.5 * pages) == bool(told)
    assert (int(done.stdout) < 0.1 * pages) != bool(told)
