"""One thread for a test, kernels interpreted without a GPU; before anything imports either."""

import gc
import os

# Tensors are small: a second thread mostly waits, and takes a core from the other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Keep the collector of garbage from going through all modules and tests again and again."""
    gc.collect()
    gc.freeze()
