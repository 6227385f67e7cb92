"""What golden tests compute on: the CPU, and a GPU where tests for one are asked for."""

import pytest
import torch


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest, full_float32: None) -> torch.device:
    """The device of a test, which runs once for each; float32 means float32 on both."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
