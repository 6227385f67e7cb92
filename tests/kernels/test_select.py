"""The fused selective kernel between its convolutions, against plain code in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.kernels import select
from bigsimclr.kernels.select import Handover, Norm, mix, pool
from bigsimclr.models.norm import EPSILON
from bigsimclr.world import ALONE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Found = dict[str, Tensor]

# Images, features of a stream, height, width. A tile has 32 positions and 64 features.
SHAPES = [(3, 70, 9, 5), (1, 5, 7, 7), (5, 64, 1, 1), (2, 130, 3, 11), (1, 8, 13, 11), (7, 2, 4, 8)]
SMALL = (2, 5, 7, 5)
TOLERANCE = 2e-6  # of the largest value; plain float32 is as far off


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that float32 has exactly, and so does float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def errors(found: Found, expected: Found) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: worst(found[name], expected[name]) for name in found}


def given(shape: tuple[int, int, int, int]) -> Found:
    """The convolution's result, batch norm, the little network that chooses, and a gradient."""
    images, features, height, width = shape
    tensors = {
        "y": draw(images, 2 * features, height, width) * 2 + draw(1, 2 * features, 1, 1, seed=1),
        "weight": draw(2 * features, seed=2),
        "bias": draw(2 * features, seed=3),
        "reduce": draw(5, features, seed=4) / features**0.5,
        "expand": draw(2 * features, 5, seed=5),
        "upstream": draw(*shape, seed=6),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def choose(pooled: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    """Weights [N, 2, F] from pooled streams [N, 2F]."""
    hidden = torch.tanh(pooled.unflatten(1, (2, -1)).sum(1) @ reduce.T)
    return (hidden @ expand.T).unflatten(1, (2, -1)).softmax(1)


def plain(y: Tensor, weight: Tensor, bias: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    streams = F.relu(F.batch_norm(y, None, None, weight, bias, training=True, eps=EPSILON))
    weights = choose(streams.mean((2, 3)), reduce, expand)[..., None, None]
    return (streams.unflatten(1, (2, -1)) * weights).sum(1)


def batch_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    return mean, variance


def fused(y: Tensor, weight: Tensor, bias: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    mean, variance = batch_statistics(y.detach())
    norm = Norm(mean, variance, weight, bias, EPSILON, ALONE)
    handover = Handover()
    weights = choose(pool(y, norm, handover), reduce, expand)
    return mix(y, norm, weights.flatten(1), handover)


def differentiate(function, tensors: Found) -> Found:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if n != "upstream"}
    mixed = function(**leaves)
    mixed.backward(tensors["upstream"].to(mixed.dtype))
    return {"mixed": mixed.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def both(tensors: Found) -> tuple[Found, Found]:
    expected = differentiate(plain, {name: tensor.double() for name, tensor in tensors.items()})
    return differentiate(fused, tensors | {"y": channels_last(tensors["y"])}), expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int]) -> None:
    found, expected = both(given(shape))
    wrong = errors(found, expected)
    print(wrong)
    assert max(wrong.values()) < TOLERANCE
    assert found["mixed"].is_contiguous(memory_format=torch.channels_last)
    assert found["dy"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("programs", [1, 20, 40])
@pytest.mark.parametrize("sides", [{}, {"positions": 16, "features": 32, "stages": 1}])
def test_any_cut_of_the_images(programs: int, sides: dict[str, int]) -> None:
    tensors = given((3, 70, 12, 11))  # 5 tiles: 1 part, 3 with a tail, 5
    y, upstream = channels_last(tensors["y"]), channels_last(tensors["upstream"])
    kept = (y, *batch_statistics(y), tensors["weight"], tensors["bias"])
    chosen, everywhere, totals = (
        draw(rows, 140, seed=seed).to(DEVICE) for seed, rows in ((7, 3), (8, 3), (9, 2))
    )

    def every(tiles: select.Tiles) -> list[Tensor]:
        way = {"epsilon": EPSILON, "tiles": tiles}
        return [
            select.sum_streams(kept, **way),
            select.mix_streams(kept, chosen, **way),
            select.sum_gradients(kept, upstream, **way),
            select.differentiate_inputs(kept, upstream, chosen, everywhere, totals, ranks=1, **way),
        ]

    tiles = replace(select.POOL, programs=programs, **sides)
    for found, expected in zip(every(tiles), every(select.POOL), strict=True):
        assert worst(found, expected.double()) < TOLERANCE


def test_the_same_bits_twice() -> None:
    tensors = given(SMALL)
    once, again = both(tensors)[0], both(tensors)[0]
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_gradient_in_any_memory_format() -> None:
    tensors = given(SMALL)
    expected = both(tensors)[0]
    found = both(tensors | {"upstream": channels_last(tensors["upstream"])})[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ones = torch.ones(1, device=DEVICE).expand(SMALL)
    assert max(errors(*both(tensors | {"upstream": ones})).values()) < TOLERANCE


def test_no_gradient_comes_from_none() -> None:
    tensors = given(SMALL)
    found, _ = both(tensors | {"upstream": torch.zeros_like(tensors["upstream"])})
    assert found.pop("mixed").abs().max() > 0
    assert all(gradient.count_nonzero() == 0 for gradient in found.values())


def test_constant_channels() -> None:
    tensors = given((2, 6, 4, 4))
    tensors["y"][:, :3] = torch.tensor([0.0, 3.0, 3.0]).view(3, 1, 1)  # the mean of 32 is exact
    tensors["bias"][:3] = torch.tensor([0.0, 1.5, -1.5])
    found, expected = both(tensors)
    assert max(errors(found, expected).values()) < TOLERANCE
    assert found["dbias"][[0, 2]].count_nonzero() == 0  # a ReLU is shut at 0
    assert found["dbias"][1] != 0


def test_a_mean_far_from_zero() -> None:
    tensors = given(SMALL)
    tensors["y"] += 64.0
    # Batch norm of float32 knows yhat to 6e-8 x mean / deviation.
    assert max(errors(*both(tensors)).values()) < 6e-8 * 64 * 4


def test_only_what_is_asked_for() -> None:
    tensors = given((2, 6, 4, 4))
    y = channels_last(tensors["y"])
    weight = tensors["weight"].requires_grad_()
    others = [tensors[name] for name in ("bias", "reduce", "expand")]
    fused(y, weight, *others).backward(tensors["upstream"])
    expected = differentiate(plain, {n: t.detach().double() for n, t in tensors.items()})
    assert worst(weight.grad, expected["dweight"]) < TOLERANCE
    with torch.no_grad():
        assert worst(fused(y, weight, *others), expected["mixed"]) < TOLERANCE


def test_nan_stays_where_it_is() -> None:
    tensors = given((3, 70, 9, 5))
    y, size = channels_last(tensors["y"]), 140
    mean, variance = batch_statistics(y)
    y[1, 3, 2, 2] = torch.nan
    norm = Norm(mean, variance, tensors["weight"], tensors["bias"], EPSILON, ALONE)
    assert pool(y, norm, Handover()).isnan().nonzero().tolist() == [[1, 3]]
    chosen = torch.full((3, size), 0.5, device=DEVICE, requires_grad=True)
    mixed = mix(y, norm, chosen, Handover())
    assert mixed.isnan().nonzero().tolist() == [[1, 3, 2, 2]]
    mixed.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.isnan().nonzero().tolist() == [[1, 3]]


def test_nan_reaches_what_it_reaches_in_the_plain_code() -> None:
    tensors = given((3, 70, 9, 5))
    tensors["y"][1, 3, 2, 2] = torch.nan
    found, expected = both(tensors)
    assert expected["mixed"].isnan().all()
    # And further: channels whose ReLU is shut everywhere are no exception.
    assert all((found[name].isnan() >= expected[name].isnan()).all() for name in expected)


@pytest.mark.parametrize(
    "y",
    [
        torch.zeros(2, 4, 3, 3),
        channels_last(torch.zeros(2, 5, 3, 3)),
        channels_last(torch.zeros(2, 4, 3, 3, dtype=torch.float64)),
    ],
)
def test_other_inputs_are_refused(y: Tensor) -> None:
    row = torch.ones(y.shape[1])
    with pytest.raises(ValueError, match=r"two streams in channels_last|float64"):
        pool(y, Norm(row, row, row, row, EPSILON, ALONE), Handover())


def test_pooled_means_lead_to_the_weights_alone() -> None:
    tensors = given((2, 6, 4, 4))
    y, row = channels_last(tensors["y"]).requires_grad_(), tensors["weight"]
    handover = Handover()
    pooled = pool(y, Norm(*batch_statistics(y.detach()), row, row, EPSILON, ALONE), handover)
    with pytest.raises(RuntimeError, match="follows that of the mixed"):
        pooled.sum().backward()


def test_no_stream_is_kept() -> None:
    tensors = given((2, 6, 16, 16))
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n != "upstream"}
    leaves["y"] = channels_last(leaves["y"].detach()).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused(**leaves)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 1000}
    assert large == {leaves["y"].data_ptr()}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 192, 14, 14), (16, 64, 56, 56)], ids=str)
def test_sixteen_bits(shape: tuple[int, int, int, int], dtype: torch.dtype, bound: float) -> None:
    tensors = given(shape)
    for name in ("y", "upstream"):
        tensors[name] = channels_last(tensors[name]).to(dtype)
    found, expected = both(tensors)
    print(errors(found, expected))
    # What is written is rounded, by 2^-9 and 2^-11 of a value.
    assert worst(found.pop("mixed"), expected["mixed"]) < bound
    # Of millions of ReLUs some are shut in float32 and open in float64.
    off = (found["dy"].double() - expected["dy"]).abs() > bound * expected["dy"].abs().max()
    assert off.sum() <= 1e-6 * off.numel()
    del found["dy"]
    assert max(worst(gradient, expected[name]) for name, gradient in found.items()) < 5e-5
