"""Batch norm with residual sum and ReLU against PyTorch in float64, values and gradients."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from bigsimclr.kernels.norm_act import norm_act, normalise
from bigsimclr.kernels.norm_gradients import REDUCE, differentiate_inputs, sum_gradients
from bigsimclr.kernels.norm_statistics import Tiles, batch_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5
TOLERANCE = 2e-6  # of the largest value; 4e-7 is met on a CPU
SHAPES = [(5, 3), (700, 5), (90, 130), (2, 3, 5, 7), (3, 66, 1, 1), (1, 8, 9, 2)]
WAYS = list(product([True, False], repeat=3))  # bias, residual, ReLU
Tensors = dict[str, Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(DEVICE)
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def arguments(shape: tuple[int, ...], *, bias: bool, residual: bool) -> Tensors:
    found = {"inputs": 3 * drawn(*shape) + 1, "weight": drawn(shape[1], seed=1)}
    if bias:
        found["bias"] = drawn(shape[1], seed=2)
    if residual:
        found["residual"] = drawn(*shape, seed=3)
    return found


def plain(given: Tensors, upstream: Tensor, *, relu: bool, gate: Tensor | None = None) -> Tensors:
    """Outputs and gradients in float64, through a ReLU that may be told where it is open."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    outputs = F.batch_norm(
        leaves["inputs"], None, None, leaves["weight"], leaves.get("bias"), True, 0.1, EPSILON
    )
    if "residual" in leaves:
        outputs = outputs + leaves["residual"]
    if relu:
        outputs = F.relu(outputs) if gate is None else outputs * gate
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream.double())
    return {"outputs": outputs.detach(), **dict(zip(leaves, gradients, strict=True))}


def fused(given: Tensors, upstream: Tensor, *, relu: bool) -> Tensors:
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    outputs = norm_act(
        leaves["inputs"],
        *batch_statistics(given["inputs"]),
        leaves["weight"],
        leaves.get("bias"),
        leaves.get("residual"),
        epsilon=EPSILON,
        relu=relu,
    )
    assert outputs.dtype == given["inputs"].dtype
    assert outputs.stride() == given["inputs"].stride()
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {"outputs": outputs.detach(), **dict(zip(leaves, gradients, strict=True))}


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check(given: Tensors, upstream: Tensor, *, relu: bool, tolerance: float) -> None:
    found, expected = fused(given, upstream, relu=relu), plain(given, upstream, relu=relu)
    assert found.keys() == expected.keys()
    errors = {name: worst(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors
    for name, value in given.items():
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize(("bias", "residual", "relu"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(
    shape: tuple[int, ...], bias: bool, residual: bool, relu: bool
) -> None:
    given = arguments(shape, bias=bias, residual=residual)
    check(given, drawn(*shape, seed=4), relu=relu, tolerance=TOLERANCE)


@pytest.mark.parametrize("rows", [32 * 7, 32 * 8 + 31])
@pytest.mark.parametrize("tiles", [replace(REDUCE, programs=6), Tiles(512, 16, 2, 1, 10)])
def test_tiles_are_shared_by_programs(rows: int, tiles: Tiles) -> None:
    given = arguments((rows, 70), bias=True, residual=True)
    upstream = drawn(rows, 70, seed=4)
    expected = plain(given, upstream, relu=True)
    channels = (*batch_statistics(given["inputs"]), given["weight"], given["bias"])
    way = {"epsilon": EPSILON, "relu": True, "tiles": tiles}
    outputs = normalise(given["inputs"], channels, given["residual"], **way)
    totals, gated = sum_gradients(upstream, given["inputs"], outputs, channels, **way)
    slopes = differentiate_inputs(
        gated, given["inputs"], channels, totals, ranks=1, **way | {"relu": False}
    )
    found = dict(zip(expected, (outputs, slopes, *totals.flip(0), gated), strict=True))
    errors = {name: worst(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("relu", [True, False])
def test_residual_and_gradient_in_another_layout(relu: bool) -> None:
    given = arguments((3, 5, 4, 6), bias=True, residual=True)
    given["residual"] = given["residual"].contiguous()
    upstream = drawn(3, 5, 1, 1, seed=4).expand(3, 5, 4, 6)  # as that of a mean over positions
    check(given, upstream, relu=relu, tolerance=TOLERANCE)


@pytest.mark.parametrize("relu", [True, False])
def test_a_scale_of_zero(relu: bool) -> None:
    given = arguments((40, 6), bias=True, residual=True)
    given["weight"] = torch.zeros_like(given["weight"])
    upstream = drawn(40, 6, seed=4)
    found = fused(given, upstream, relu=relu)
    assert not found["inputs"].any()
    expected = plain(given, upstream, relu=relu)
    assert worst(found["weight"], expected["weight"]) < TOLERANCE
    assert worst(found["residual"], expected["residual"]) == 0


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_of_fewer_bits_gets_the_gradient_rounded_once(
    dtype: torch.dtype, relu: bool
) -> None:
    given = arguments((5, 66, 7, 9), bias=True, residual=True)
    upstream = drawn(5, 66, 7, 9, seed=4)
    given["residual"] = given["residual"].round()  # the same numbers in all types
    wide = fused(given, upstream, relu=relu)
    given["residual"] = given["residual"].to(dtype)
    found = fused(given, upstream, relu=relu)
    assert found["residual"].dtype == dtype
    assert torch.equal(found["residual"], wide["residual"].to(dtype))
    for name in ("outputs", "inputs", "weight", "bias"):
        assert torch.equal(found[name], wide[name])


def test_the_gradient_of_a_residual_is_the_upstream_one_or_zero() -> None:
    given = arguments((300, 70), bias=True, residual=True)
    upstream = drawn(300, 70, seed=4)
    found = fused(given, upstream, relu=True)
    assert torch.equal(found["residual"], torch.where(found["outputs"] > 0, upstream, 0))


def test_the_upstream_gradient_is_not_written_to() -> None:
    for residual, relu in product([True, False], repeat=2):
        given = arguments((40, 6), bias=True, residual=residual)
        upstream = drawn(40, 6, seed=4)
        fused(given, upstream, relu=relu)
        assert torch.equal(upstream, drawn(40, 6, seed=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_of_weight_and_bias_are_of_their_types(dtype: torch.dtype) -> None:
    given = arguments((40, 6), bias=True, residual=True)
    for name in ("weight", "bias"):
        given[name] = given[name].half().to(dtype)
    check(given, drawn(40, 6, seed=4), relu=True, tolerance=1e-3 if dtype.itemsize < 4 else 2e-6)


def test_relu_is_shut_at_zero_itself() -> None:
    given = {"inputs": drawn(40, 6), "weight": torch.zeros(6, device=DEVICE)}
    found = fused(given, drawn(40, 6, seed=4), relu=True)
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("residual", [True, False])
def test_nan_is_not_lost(residual: bool) -> None:
    given = arguments((40, 6), bias=True, residual=residual)
    given["inputs"][3, 2] = torch.nan
    found = fused(given, drawn(40, 6, seed=4), relu=True)
    spoilt = [False, False, True, False, False, False]
    assert found["outputs"].isnan().all(0).tolist() == spoilt
    assert found["inputs"].isnan().all(0).tolist() == spoilt
    assert found["weight"].isnan().tolist() == spoilt
    assert found["outputs"].isnan().any(0).tolist() == spoilt


def test_nan_that_comes_back_is_not_lost() -> None:
    given = arguments((40, 6), bias=True, residual=False)
    given["bias"] += 100  # all of ReLU is open
    upstream = drawn(40, 6, seed=4)
    upstream[30, 1] = torch.nan
    found = fused(given, upstream, relu=True)
    assert found["inputs"].isnan().all(0).tolist() == [False, True, False, False, False, False]
    assert found["bias"].isnan().tolist() == [False, True, False, False, False, False]


def test_the_same_bits_twice() -> None:
    given = arguments((5, 66, 7, 9), bias=True, residual=True)
    upstream = drawn(5, 66, 7, 9, seed=4)
    first, second = (fused(given, upstream, relu=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("residual", "relu", "kept"), [(0, 1, 1), (1, 0, 1), (1, 1, 2)])
def test_no_more_is_kept_than_needed(residual: bool, relu: bool, kept: int) -> None:
    given = arguments((40, 6), bias=True, residual=residual)
    large: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == 240:
            large.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(given, drawn(40, 6, seed=4), relu=relu)
    assert len(large) == kept


@pytest.mark.parametrize("residual", [True, False])
def test_ranks_sum_in_the_middle_of_the_backward_pass(residual: bool) -> None:
    """Two halves with the statistics of the whole, and the sums of the other half added."""
    given = arguments((60, 6), bias=True, residual=residual)
    upstream = drawn(60, 6, seed=4)
    expected = plain(given, upstream, relu=True)
    mean, variance = batch_statistics(given["inputs"])
    channels = (mean, variance, given["weight"], given["bias"])
    way = {"epsilon": EPSILON, "relu": True}
    outputs = expected["outputs"].float() if residual else None
    halves = [slice(0, 30), slice(30, 60)]
    totals = sum(
        sum_gradients(
            upstream[half],
            given["inputs"][half],
            None if outputs is None else outputs[half],
            channels,
            **way,
        )[0]
        for half in halves
    )
    assert isinstance(totals, Tensor)
    assert worst(totals, torch.stack([expected["bias"], expected["weight"]])) < TOLERANCE
    for half in halves:
        leaf = given["inputs"][half].clone().requires_grad_()
        found = norm_act(
            leaf,
            *channels,
            given["residual"][half] if residual else None,
            ranks=2,
            total=lambda _: totals,
            **way,
        )
        found.backward(upstream[half])
        assert leaf.grad is not None
        assert worst(leaf.grad, expected["inputs"][half]) < TOLERANCE


def test_it_is_differentiated_once() -> None:
    leaf = drawn(8, 3).requires_grad_()
    weight = drawn(3, seed=1)
    outputs = norm_act(
        leaf, *batch_statistics(leaf.detach()), weight, None, epsilon=EPSILON, relu=True
    )
    (slope,) = torch.autograd.grad(outputs.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        slope.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    inputs, values = drawn(8, 3), torch.ones(3, device=DEVICE)
    way = {"epsilon": EPSILON, "relu": True}
    with pytest.raises(ValueError, match="the kernels take"):
        norm_act(inputs.double(), values, values, values, None, **way)
    for place in range(4):
        channels = [values] * 4
        channels[place] = torch.ones(4, device=DEVICE)
        with pytest.raises(ValueError, match=r"is \[4\] for inputs of 3 channels"):
            norm_act(inputs, *channels, **way)
    with pytest.raises(ValueError, match=r"the residual is \[8, 1\]"):
        norm_act(inputs, values, values, values, None, drawn(8, 1), **way)
    with pytest.raises(ValueError, match="2 ranks share statistics"):
        norm_act(inputs, values, values, values, None, ranks=2, **way)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("bias", "residual", "relu"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (16, 200, 7, 7), (300, 2048)])
def test_sixteen_bits(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, residual: bool, relu: bool
) -> None:
    given = arguments(shape, bias=bias, residual=residual)
    given |= {name: given[name].to(dtype) for name in given if given[name].ndim > 1}
    upstream = drawn(*shape, seed=4).to(dtype)
    found = fused(given, upstream, relu=relu)
    # Of many of values some are so near zero that float32 and float64 differ on their sign.
    expected = plain(given, upstream, relu=relu, gate=found["outputs"] > 0)
    for name, value in expected.items():
        tolerance = torch.finfo(dtype).eps if value.ndim > 1 else 1e-5
        assert worst(found[name], value) < tolerance, name


@pytest.mark.gpu
def test_a_graph_captures_all_of_it() -> None:
    given = arguments((8, 64, 28, 28), bias=True, residual=True)
    given |= {name: given[name].bfloat16() for name in given if given[name].ndim > 1}
    upstream = drawn(8, 64, 28, 28, seed=4).bfloat16()
    expected = fused(given, upstream, relu=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(given, upstream, relu=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused(given, upstream, relu=True)
    graph.replay()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values() -> None:
    rows, part = 2**25 + 5, 1000
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    inputs = torch.randn(rows, 64, device=DEVICE, dtype=torch.bfloat16)
    upstream = torch.randn(rows, 64, device=DEVICE, dtype=torch.bfloat16)
    weight, bias = drawn(64, seed=1), drawn(64, seed=2)
    mean, variance = batch_statistics(inputs)
    assert float(mean.abs().max()) < 2e-3
    assert float((variance - 1).abs().max()) < 2e-3
    channels = (mean, variance, weight, bias)
    way = {"epsilon": EPSILON, "relu": True}
    outputs = norm_act(inputs, *channels, **way)
    end = norm_act(inputs[-part:].clone(), *channels, **way)
    assert torch.equal(outputs[-part:], end)
    totals, came = sum_gradients(upstream, inputs, None, channels, **way)
    assert came is upstream
    slopes = differentiate_inputs(upstream, inputs, channels, totals, ranks=1, **way)
    normal = (inputs[-part:].float() - mean) * (variance + EPSILON).rsqrt()
    shut = torch.where(normal * weight + bias > 0, upstream[-part:].float(), 0)
    sums = totals / rows
    expected = (shut - sums[0] - normal * sums[1]) * weight * (variance + EPSILON).rsqrt()
    assert worst(slopes[-part:], expected.double()) < torch.finfo(torch.bfloat16).eps
