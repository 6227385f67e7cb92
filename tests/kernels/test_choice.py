"""Which kernels a run takes: what `auto` chooses, and what an order by name needs."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from bigsimclr.kernels import is_interpreted, uses_triton

CPU = torch.device("cpu")


def test_auto_is_plain_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not uses_triton("auto", CPU)
        assert not uses_triton("plain", CPU)
    assert caplog.messages[-1] == "kernels: plain PyTorch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted with a GPU")
def test_an_order_is_followed_in_the_interpreter(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert is_interpreted()
        assert uses_triton("triton", CPU)
    assert caplog.messages == ["kernels: fused, in Triton"]


def test_an_order_that_cannot_be_followed_is_refused() -> None:
    program = (
        "import torch, bigsimclr.kernels as k\n"
        "try: k.uses_triton('triton', torch.device('cpu'))\n"
        "except k.MissingExtraError as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "parallel.kernels: triton cannot run here: there is no GPU; parallel.kernels=auto takes "
        "what can\n"
    )
