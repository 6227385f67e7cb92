"""The methods that benchmarks.optimizer compares compute what they are said to."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.nn import Parameter

from benchmarks import capture
from benchmarks.optimizer_methods import (
    Parameters,
    captured,
    copying,
    error,
    fused,
    loop,
    plain,
    sgd,
)


def parameters(device: str = "cpu") -> Parameters:
    generator = torch.Generator().manual_seed(0)
    made = [
        Parameter(torch.randn(*shape, generator=generator).to(device)) for shape in [(8, 9), (7,)]
    ]
    for parameter in made:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = 1e-2 * noise.to(device)
    return Parameters(made[:1], made[1:])


@pytest.mark.parametrize("make", [plain, loop, sgd])
def test_a_method_follows_its_definition(make) -> None:
    given = parameters()
    initial = [parameter.detach().clone() for parameter in given]
    assert error(make.__name__, make, given, initial) < 1e-5


@pytest.mark.parametrize(("make", "other"), [(plain, "loop"), (loop, "plain"), (sgd, "plain")])
def test_a_method_that_computes_something_else_is_found(make, other) -> None:
    given = parameters()
    initial = [parameter.detach().clone() for parameter in given]
    for parameter in given.kernels:
        parameter.grad = parameter.detach() * -1e-3  # decay and gradient are comparable
    with pytest.raises(AssertionError, match="something else"):
        error(other, make, given, initial)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [fused, captured, copying])
def test_a_method_of_a_gpu_follows_its_definition(make) -> None:
    given = parameters("cuda")
    initial = [parameter.detach().clone() for parameter in given]
    assert error(make.__name__, make, given, initial) < 1e-5


class Recorder:
    """Stands for a stream and for a graph: a replay counts, and knows of nothing else."""

    replays = 0

    def wait_stream(self, other: "Recorder") -> None:
        assert isinstance(other, Recorder)

    def replay(self) -> None:
        self.replays += 1


def test_a_replay_keeps_what_its_work_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Recorder)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    table = torch.zeros(())
    replay = capture.captured(lambda table=table: table.add_(1))
    assert table == capture.WARM_CALLS + 1
    alive = weakref.ref(table)
    del table
    gc.collect()
    assert alive() is not None
    replay()
    assert replay.graph.replays == 1
    del replay
    gc.collect()
    assert alive() is None
