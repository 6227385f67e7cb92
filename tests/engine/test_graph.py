"""Updates recorded as a CUDA graph: the numbers of updates that are not, or a refusal."""

from pathlib import Path

import pytest
import torch

from bigsimclr.engine.checkpoint import newest_checkpoint
from bigsimclr.errors import RecipeError
from tests.stages import tiny

NO_PROBE = "probe={knn_every_epochs: null}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "this run computes on a CPU"),
        (("parallel.strategy=fsdp2",), "fsdp2 moves parameters while it computes"),
        (("parallel.precision=fp16",), "a graph cannot follow the loss scale of fp16"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    device = "parallel.device=cpu"
    with pytest.raises(RecipeError, match=f"parallel.cuda_graph: {message}"):
        tiny.run(tiny.PRETRAIN, tmp_path, NO_PROBE, device, "parallel.cuda_graph=true", *overrides)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["plain", "triton"])
@pytest.mark.parametrize("memory", ["none", "selective"])
def test_a_recorded_run_ends_where_another_does(
    precision: str, kernels: str, memory: str, tmp_path: Path
) -> None:
    settings = (
        NO_PROBE,
        "parallel.deterministic=true",
        f"parallel.precision={precision}",
        f"parallel.kernels={kernels}",
        f"parallel.memory={memory}",
        "optimizer.learning_rate=0.01",
    )
    found = {}
    for graph in ("true", "false"):
        tiny.run(tiny.PRETRAIN, tmp_path / graph, *settings, f"parallel.cuda_graph={graph}")
        checkpoint = newest_checkpoint(tmp_path / graph / "checkpoints")
        assert checkpoint is not None
        found[graph] = checkpoint.tensors["model"]
    for name, expected in found["false"].items():
        difference = (found["true"][name] - expected).norm()
        assert difference <= 1e-4 * expected.norm().clamp_min(1e-3), name


@pytest.mark.gpu
def test_shapes_that_change_are_not_recorded(tmp_path: Path) -> None:
    settings = (NO_PROBE, "parallel.cuda_graph=true")
    with pytest.raises(RecipeError, match="a cached update makes passes of several shapes"):
        tiny.run(tiny.PRETRAIN, tmp_path / "cached", *settings, "batch.micro_batch=16")
    queue = "loss={queue: {length: 16, ema_decay: 0.9}}"
    with pytest.raises(RecipeError, match="a queue that fills changes its shape"):
        tiny.run(tiny.PRETRAIN, tmp_path / "queue", *settings, queue)
    assert torch.cuda.is_available()
