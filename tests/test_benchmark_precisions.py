"""The plain step of benchmarks.precisions, on a CPU, and what is read from its kernels' names."""

import pytest
import torch

from benchmarks.kernel_classes import KernelTime
from benchmarks.loops import Case
from benchmarks.precisions import WAYS, Step, check, line, measure_what_fits, normalisers

CPU = torch.device("cpu")
TINY = Case("r10-0.125x-cifar", batch=8, size=8)


def test_all_ways_compute_the_same_step() -> None:
    found = {
        name: measure_what_fits(way, TINY, CPU, rounds=2, steps=1)
        for name, way in WAYS.items()
        if not way.compiled
    }
    check(found)
    for name, row in found.items():
        assert row["batch"] == 8
        assert len(row["images_per_second_of_rounds"]) == 2
        assert name in line(name, row)
    assert found["fp32"]["first_losses"][0] == pytest.approx(6.908, abs=0.5)  # log of the classes
    with pytest.raises(ValueError, match="bf16 begins with a loss of"):
        check({**found, "bf16": {"first_losses": [7.6]}})
    check({"fp32": {"out_of_memory": True}, "bf16": found["bf16"]})
    assert "out of memory" in line("fp32", {"out_of_memory": True})


def test_the_step_trains() -> None:
    step = Step(WAYS["fp32"], TINY, CPU)
    losses = [float(step()) for _ in range(60)]
    assert losses[-1] < losses[0]


def test_who_normalises() -> None:
    def kernels(*names: str) -> list[KernelTime]:
        return [KernelTime(name, 10.0 - number, 1) for number, name in enumerate(names)]

    native = "void at::native::batch_norm_collect_statistics_channels_last_kernel<float>(...)"
    cudnn = "void cudnn::bn_fw_tr_1C11_kernel_NCHW<__half, float, 512, true, 1>(...)"
    compiled = "triton_red_fused__native_batch_norm_legit_functional_relu_3"
    assert normalisers(kernels(cudnn, "sm90_xmma_fprop")) == {"by": ["cudnn"], "kernels": [cudnn]}
    assert normalisers(kernels(native, cudnn))["by"] == ["cudnn", "native"]
    assert normalisers(kernels(compiled))["by"] == ["compiled"]
    assert normalisers(kernels("apply"))["by"] == []
