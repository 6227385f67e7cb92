"""A convolution and a shortcut that share their inputs: values and gradients of plain autograd."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.models.fork import fork
from bigsimclr.models.layers import Convolution, WorkingWeights
from bigsimclr.models.resnet import Bottleneck, fork_bottlenecks
from tests.models.test_fused_norm import bottleneck, errors
from tests.models.test_memory import State, same_bits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.contiguous(memory_format=torch.channels_last)


def convolution(dtype: torch.dtype = torch.float64) -> Convolution:
    layer = Convolution(12, 5, kernel=1, generator=torch.Generator().manual_seed(0))
    return layer.to(dtype, memory_format=torch.channels_last)


def state(layer: Convolution, inputs: Tensor, *, forked: bool, shortcut_times: float) -> State:
    """Return values and gradients where both branches are used."""
    inputs = inputs.detach().requires_grad_()
    outputs, beside = fork(layer, inputs) if forked else (layer(inputs), inputs)
    weights = drawn(*outputs.shape, seed=1), drawn(*inputs.shape, seed=2)
    loss = (outputs * weights[0]).sum() + (beside.sin() * weights[1]).sum() * shortcut_times
    loss.backward()
    weight = layer.weight.grad
    layer.weight.grad = None
    values = {"outputs": outputs.detach(), "beside": beside.detach()}
    return {**values, "inputs": inputs.grad, "weight": weight}


@pytest.mark.parametrize("shape", [(3, 12, 6, 5), (2, 12, 1, 1), (1, 12, 4, 4)])
@pytest.mark.parametrize("shortcut_times", [1.0, 0.0])
def test_values_and_gradients_are_those_of_autograd(
    shape: tuple[int, ...], shortcut_times: float
) -> None:
    inputs = drawn(*shape)
    found, expected = (
        state(convolution(), inputs, forked=forked, shortcut_times=shortcut_times)
        for forked in (True, False)
    )
    assert max(errors(found, expected).values()) < 1e-14
    assert found["inputs"].is_contiguous(memory_format=torch.channels_last)


def test_the_sum_is_written_where_the_shortcuts_gradient_was() -> None:
    inputs = drawn(3, 12, 6, 5).requires_grad_()
    outputs, beside = fork(convolution(), inputs)
    (outputs.sum() + beside.sin().sum()).backward()
    places: list[int] = []
    outputs, beside = fork(convolution(), inputs)
    beside.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    (gradient,) = torch.autograd.grad(outputs.sum() + beside.sin().sum(), inputs)
    assert places == [gradient.data_ptr()]


@pytest.mark.parametrize("frozen", ["inputs", "weight"])
def test_what_wants_no_gradient_gets_none(frozen: str) -> None:
    layer, inputs = convolution(), drawn(3, 12, 6, 5)
    inputs.requires_grad_(frozen != "inputs")
    layer.weight.requires_grad_(frozen != "weight")
    outputs, beside = fork(layer, inputs)
    (outputs.sum() + beside.sum()).backward()
    assert (inputs.grad is None) == (frozen == "inputs")
    assert (layer.weight.grad is None) == (frozen == "weight")
    if frozen == "weight":
        expected = layer.weight.sum(0).flatten() + 1
        torch.testing.assert_close(inputs.grad, expected[:, None, None].expand_as(inputs))


@pytest.mark.parametrize("has_copies", [True, False])
def test_under_autocast_it_is_what_autocast_computes(has_copies: bool) -> None:
    layer, inputs = convolution(torch.float32), drawn(3, 12, 6, 5).bfloat16()
    if has_copies:
        WorkingWeights(layer, torch.bfloat16)
    found: list[State] = []
    for forked in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(state(layer, inputs, forked=forked, shortcut_times=1.0))
    same_bits(*({k: v for k, v in one.items() if k != "inputs"} for one in found))
    assert found[0]["outputs"].dtype == found[0]["inputs"].dtype == torch.bfloat16
    assert found[0]["weight"].dtype == torch.float32
    assert errors(*found)["inputs"] < 2**-7  # the plain sum rounds twice, this once


def test_inputs_of_another_type_are_left_to_autocast() -> None:
    layer, inputs = convolution(torch.float32), drawn(3, 12, 6, 5).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, beside = fork(layer, inputs)
    assert outputs.dtype == torch.bfloat16
    assert beside is inputs


def test_it_is_differentiable_once() -> None:
    inputs = drawn(3, 12, 6, 5).requires_grad_()
    outputs, beside = fork(convolution(), inputs)
    loss = (outputs.square().sum() + beside.sum()).square()
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_to_the_last(dtype: torch.dtype, device: str) -> None:
    layer, inputs = convolution(dtype).to(device), drawn(16, 12, 7, 9).to(device, dtype)
    exact = copy.deepcopy(layer).double().cpu()
    (outputs, beside), (plain, _) = (
        fork(one, values.requires_grad_())
        for one, values in ((layer, inputs), (exact, inputs.detach().double().cpu()))
    )
    assert type(outputs.grad_fn).__name__ == "_ForkBackward"
    upstream = drawn(*outputs.shape, seed=1).to(dtype), drawn(*inputs.shape, seed=2).to(dtype)
    torch.autograd.backward([outputs, beside], [value.to(device, copy=True) for value in upstream])
    (slope,) = torch.autograd.grad(plain, exact.weight, upstream[0].double(), retain_graph=True)
    places = upstream[0].double().permute(0, 2, 3, 1) @ exact.weight.detach().flatten(1)
    expected = upstream[1].double() + places.permute(0, 3, 1, 2)
    found = {"outputs": outputs.detach().double().cpu(), "inputs": inputs.grad.double().cpu()}
    found["weight"] = layer.weight.grad.double().cpu()
    wrong = errors(found, {"outputs": plain.detach(), "inputs": expected, "weight": slope})
    assert max(wrong.values()) < 2 * torch.finfo(dtype).eps, wrong


# --- blocks --------------------------------------------------------------------------------------


def exact(*, projects: bool, selective_kernel: bool) -> Bottleneck:
    block = bottleneck(projects=projects, selective_kernel=selective_kernel)
    return block.double().to(memory_format=torch.channels_last)


def passed(block: Bottleneck, inputs: Tensor) -> State:
    inputs = inputs.detach().requires_grad_()
    outputs = block(F.relu(inputs))
    (outputs * drawn(*outputs.shape, seed=1)).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    values = {"outputs": outputs.detach(), **dict(block.named_buffers())}
    return {**values, "inputs": inputs.grad, **gradients}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("selective_kernel", [False, True])
def test_a_forked_bottleneck_is_the_plain_one(
    selective_kernel: bool, projects: bool, training: bool
) -> None:
    plain = exact(projects=projects, selective_kernel=selective_kernel).train(training)
    forked = copy.deepcopy(plain)
    fork_bottlenecks(forked)
    inputs = drawn(3, 16, 7, 6)
    wrong = errors(passed(forked, inputs), passed(plain, inputs))
    assert max(wrong.values()) < 1e-12, wrong


@pytest.mark.parametrize("memory", ["selective", "block"])
@pytest.mark.parametrize("projects", [True, False])
def test_computed_again_it_has_the_same_bits(projects: bool, memory: str) -> None:
    block = exact(projects=projects, selective_kernel=True)
    fork_bottlenecks(block)
    again = copy.deepcopy(block)
    again.memory = memory
    inputs = drawn(3, 16, 7, 6)
    same_bits(passed(again, inputs), passed(block, inputs))
