"""One thread for a test, kernels interpreted without a GPU; before anything imports either."""

import gc
import os
from collections.abc import Iterator

import pytest

# Tensors are small: a second thread mostly waits, and takes a core from the other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Let a GPU convolve float32 in float32; by itself it takes TF32, which keeps 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def pytest_collection_finish() -> None:
    """Keep the collector of garbage from going through all modules and tests again and again."""
    gc.collect()
    gc.freeze()
