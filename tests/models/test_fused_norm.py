"""Networks with the fused batch norm: those of the plain one but for rounding errors."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigsimclr.kernels import norm_statistics
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.norm import BatchNorm, frozen_running_statistics, fuse_batch_norm
from bigsimclr.models.resnet import Bottleneck, PooledStem, ResNet
from bigsimclr.models.simclr import SimCLR
from tests.models.test_memory import (
    State,
    forwards_before_a_backward,
    frozen_while_forward,
    images,
    moved_before_the_backward,
    network,
    one_pass,
    same_bits,
    state_after,
)

TOLERANCE = 1e-5  # of the largest value of a tensor; plain float32 is as far from float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def random_norm(channels: int, *, has_bias: bool = True, fused: bool = False) -> BatchNorm:
    norm = BatchNorm(channels, has_bias=has_bias)
    with torch.no_grad():
        for number, values in enumerate([*norm.parameters(), *norm.buffers()], 1):
            values.copy_(drawn(channels, seed=number).abs())
    norm.fused = fused
    return norm


def errors(found: State, expected: State) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-12))
        for name, value in expected.items()
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of which the kernels took statistics."""
    seen: list[tuple[int, ...]] = []
    real = norm_statistics.batch_statistics

    def watched(
        inputs: Tensor, *, running: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        seen.append(tuple(inputs.shape))
        return real(inputs, running=running, momentum=momentum)

    monkeypatch.setattr(norm_statistics, "batch_statistics", watched)
    return seen


# --- one batch norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 2)])
def test_plain_is_pytorch_to_the_bit(shape: tuple[int, ...], training: bool) -> None:
    one, other = random_norm(4).train(training), random_norm(4).train(training)
    inputs, residual = drawn(*shape), drawn(*shape, seed=1)
    assert torch.equal(one(inputs, relu=True), F.relu(other(inputs)))
    assert torch.equal(one(inputs, residual), other(inputs) + residual)
    assert torch.equal(one(inputs, residual, relu=True), F.relu(other(inputs) + residual))
    same_bits(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 2)])
def test_fused_is_plain(
    shape: tuple[int, ...], has_bias: bool, calls: list[tuple[int, ...]]
) -> None:
    found: list[State] = []
    for fused in (True, False):
        norm = random_norm(4, has_bias=has_bias, fused=fused)
        inputs, residual = drawn(*shape).requires_grad_(), drawn(*shape, seed=1).requires_grad_()
        outputs = norm(norm(inputs, relu=True), residual, relu=True)
        with frozen_running_statistics(norm):
            outputs = norm(outputs)
        (outputs * drawn(*shape, seed=2)).sum().backward()
        gradients = {name: p.grad for name, p in norm.named_parameters()}
        gradients |= {"inputs": inputs.grad, "residual": residual.grad}
        found.append({"outputs": outputs.detach(), **gradients, **dict(norm.named_buffers())})
    assert calls == [shape] * 3
    wrong = errors(*found)
    assert max(wrong.values()) < 3e-6, wrong


def test_running_statistics_move_once_for_a_batch_and_as_by_pytorch() -> None:
    one, other = random_norm(4, fused=True), random_norm(4)
    for seed in range(3):
        inputs = drawn(3, 4, 5, 2, seed=seed)
        one(inputs)
        values = inputs.double().transpose(0, 1).flatten(1)
        other.running_mean.lerp_(values.mean(1).float(), 0.1)
        other.running_var.lerp_(values.var(1, correction=0).float(), 0.1)
        with frozen_running_statistics(one):
            one(inputs + 1)
    wrong = errors(dict(one.named_buffers()), dict(other.named_buffers()))
    assert max(wrong.values()) < 5e-7, wrong


def test_running_statistics_of_other_types_move_too() -> None:
    one, other = random_norm(4, fused=True), random_norm(4, fused=True)
    one.running_mean, one.running_var = one.running_mean.double(), one.running_var.double()
    for norm in (one, other):
        norm(drawn(3, 4, 5, 2))
    assert one.running_mean.dtype == one.running_var.dtype == torch.float64
    wrong = errors(dict(one.named_buffers()), dict(other.named_buffers()))
    assert max(wrong.values()) < 5e-7, wrong


def test_a_change_under_a_backward_pass_that_needs_the_running_statistics_is_told() -> None:
    norm = random_norm(4, fused=True).eval()
    inputs = drawn(6, 4).requires_grad_()
    outputs = norm(inputs)
    norm.train()(drawn(6, 4, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_fused_is_for_training_in_channels_last_of_at_most_32_bits(
    calls: list[tuple[int, ...]],
) -> None:
    one, other = random_norm(4, fused=True), random_norm(4)
    inputs = drawn(3, 4, 5, 2)
    for module in (one, other):
        module.eval()
    assert torch.equal(one(inputs, relu=True), other(inputs, relu=True))
    for module in (one, other):
        module.train()
    assert torch.equal(one(inputs.contiguous()), other(inputs.contiguous()))
    assert torch.equal(one.double()(inputs.double()), other.double()(inputs.double()))
    same_bits(one.state_dict(), other.state_dict())
    assert calls == []


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        random_norm(3, fused=True)(torch.zeros(1, 3))


def test_copies_stay_fused(calls: list[tuple[int, ...]]) -> None:
    copy.deepcopy(random_norm(4, fused=True))(drawn(6, 4))
    assert calls == [(6, 4)]


# --- networks ------------------------------------------------------------------------------------


def fused_network(*, selective_kernel: bool = False, memory: Memory = "none") -> SimCLR:
    model = network(10, selective_kernel=selective_kernel, memory=memory)
    fuse_batch_norm(model)
    return model


def along_a_direction(model: SimCLR) -> Tensor:
    """Take a loss whose gradient is large, unlike that of the squares behind a batch norm.

    Returns:
        The projections [8, 16]: the loss is a sum that may cancel to less than its rounding.
    """
    dtype = next(model.parameters()).dtype
    outputs = model(images(8).to(dtype)).projections[-1]
    (outputs * drawn(8, 16, seed=8).to(dtype)).sum().backward()
    return outputs


@pytest.mark.parametrize("selective_kernel", [False, True])
def test_a_fused_network_is_the_plain_one(
    selective_kernel: bool, calls: list[tuple[int, ...]]
) -> None:
    plain = network(10, selective_kernel=selective_kernel).double()
    model = fused_network(selective_kernel=selective_kernel)
    assert list(model.state_dict()) == list(plain.state_dict())
    wrong = errors(state_after(along_a_direction, model), state_after(along_a_direction, plain))
    assert max(wrong.values()) < TOLERANCE, wrong
    assert len(calls) == sum(isinstance(module, BatchNorm) for module in model.modules())


def bottleneck(*, projects: bool, selective_kernel: bool) -> Bottleneck:
    """Make a block whose last scale is not zero, so that all of it counts."""
    block = Bottleneck(
        16,
        4,
        stride=2 if projects else 1,
        projects=projects,
        selective_kernel=selective_kernel,
        generator=torch.Generator().manual_seed(0),
    )
    block.bn3.weight.detach().fill_(0.7)
    return block


@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("selective_kernel", [False, True])
def test_a_fused_bottleneck_is_the_plain_one(
    selective_kernel: bool, projects: bool, calls: list[tuple[int, ...]]
) -> None:
    found: list[State] = []
    for fused in (True, False):
        block = bottleneck(projects=projects, selective_kernel=selective_kernel)
        inputs = drawn(3, 16, 7, 6)
        if fused:
            fuse_batch_norm(block)
        else:
            block, inputs = block.double(), inputs.double()
        inputs.requires_grad_()
        outputs = block(inputs)
        (outputs * drawn(*outputs.shape, seed=1)).sum().backward()
        gradients = {"inputs": inputs.grad, **{n: p.grad for n, p in block.named_parameters()}}
        found.append({"outputs": outputs.detach(), **gradients, **dict(block.named_buffers())})
    wrong = errors(*found)
    assert max(wrong.values()) < TOLERANCE, wrong
    assert len(calls) == 3 + projects + selective_kernel


@pytest.mark.parametrize(
    "step",
    [
        one_pass,
        *(
            pytest.param(step, marks=pytest.mark.slow)
            for step in (
                forwards_before_a_backward,
                frozen_while_forward,
                moved_before_the_backward,
            )
        ),
    ],
)
@pytest.mark.parametrize("memory", ["selective", "block"])
def test_what_is_computed_again_has_the_same_bits(
    memory: Memory, step: Callable[[SimCLR], Tensor], calls: list[tuple[int, ...]]
) -> None:
    expected = state_after(step, fused_network(selective_kernel=True))
    taken = len(calls)
    model = fused_network(selective_kernel=True, memory=memory)
    same_bits(state_after(step, model), expected)
    assert len(calls) == 2 * taken  # as many again, so that none was taken twice
    assert all(m.note is None for m in model.modules() if isinstance(m, BatchNorm))


# --- the pooled stem -----------------------------------------------------------------------------


def stemmed() -> ResNet:
    generator = torch.Generator().manual_seed(0)
    return ResNet(
        depth=10, width=1 / 4, selective_kernel=True, stem="imagenet", generator=generator
    )


def test_the_pooled_stem_computes_what_its_modules_say() -> None:
    one, other = stemmed().conv1, stemmed().conv1
    assert isinstance(one, PooledStem)
    modules = nn.Sequential(*other)
    assert [name for name, _ in one.named_parameters()] == [
        "0.weight",
        "1.weight",
        "1.bias",
        "3.weight",
        "4.weight",
        "4.bias",
        "6.weight",
    ]
    images = drawn(2, 3, 12, 12)
    for training in (True, False):
        one.train(training)
        modules.train(training)
        assert torch.equal(one(images), modules(images))
    same_bits(one.state_dict(), modules.state_dict())


def test_a_fused_pooled_stem_is_the_plain_one(calls: list[tuple[int, ...]]) -> None:
    found: list[State] = []
    for fused in (True, False):
        stem = stemmed().conv1
        if fused:
            fuse_batch_norm(stem)
        outputs = stem(drawn(2, 3, 12, 12))
        (outputs * drawn(*outputs.shape, seed=1)).sum().backward()
        gradients = {name: p.grad for name, p in stem.named_parameters()}
        found.append({"outputs": outputs.detach(), **gradients, **dict(stem.named_buffers())})
    wrong = errors(*found)
    assert max(wrong.values()) < TOLERANCE, wrong
    assert len(calls) == 2


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_each_replay_of_a_graph_moves_the_running_statistics() -> None:
    one, other = (random_norm(64, fused=True).cuda() for _ in range(2))
    inputs = drawn(8, 64, 7, 7).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one(inputs)
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        other(inputs)
    same_bits(one.state_dict(), other.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("selective_kernel", [False, True])
def test_a_fused_network_is_the_plain_one_in_16_bits_of_a_gpu(selective_kernel: bool) -> None:
    found: list[State] = []
    for fused in (True, False):
        model = network(10, selective_kernel=selective_kernel).cuda()
        if fused:
            fuse_batch_norm(model)
        pixels = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            features = model(pixels).features
        features.float().square().sum().backward()
        found.append({"features": features.detach(), **dict(model.named_buffers())})
    wrong = errors(*found)
    assert max(wrong.values()) < 0.05, wrong
