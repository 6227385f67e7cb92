"""Before anything imports Triton: without a GPU its kernels are interpreted."""

import gc
import os
from collections.abc import Iterator

import pytest
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
