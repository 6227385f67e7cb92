"""How a process is set up for its device."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of ten rounds of four tensors of 24 MB, after ten rounds before.
FAULTS = """
import resource, torch
from bigsimclr.world import ALONE, use_device
use_device(ALONE, "cpu")
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(6_000_000) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes these settings")
@pytest.mark.parametrize("told", [False, True])
def test_freed_memory_is_used_again_unless_the_environment_decides(*, told: bool) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")}
    if told:
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    pages = 40 * 24_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) > 0.5 * pages) == told
    assert (int(done.stdout) < 0.1 * pages) != told
