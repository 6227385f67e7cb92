"""Fused NT-Xent against the plain loss in float64: value and gradient."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from bigsimclr.kernels import nt_xent as kernels
from bigsimclr.kernels.nt_xent_rows import LARGEST_EXPONENT
from bigsimclr.losses.nt_xent import nt_xent, unit_rows
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUE, GRADIENT = 2e-6, 5e-6  # relative, the second to the norm of the whole gradient
BF16_VALUE, BF16_GRADIENT = 1e-4, 2e-3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views(pairs: int, values: int, *, apart: float) -> tuple[Tensor, Tensor]:
    """Two views whose second one is the first plus noise; inf: nothing in common."""
    first, noise = drawn(pairs, values, seed=1), drawn(pairs, values, seed=2)
    return first, noise if math.isinf(apart) else first + apart * noise


def measured(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float,
    queue: Tensor | None = None,
    fused: str | None,
    upstream: float = 1.7,
) -> tuple[float, Tensor]:
    """Loss and gradient [2B, D], in float64 where nothing is fused."""
    kind = torch.float64 if fused is None else first.dtype
    device = "cpu" if fused is None else DEVICE
    leaves = [
        view.detach().to(device, kind, copy=True).requires_grad_() for view in (first, second)
    ]
    past = None if queue is None else queue.to(device, kind)
    loss = nt_xent(*leaves, temperature=temperature, queue=past, fused=fused)
    (upstream * loss).backward()
    return loss.item(), torch.cat([leaf.grad for leaf in leaves]).double().cpu()


def compare(
    first: Tensor, second: Tensor, *, temperature: float, queue: Tensor | None = None
) -> None:
    value, gradient = measured(first, second, temperature=temperature, queue=queue, fused="fp32")
    expected, slopes = measured(first, second, temperature=temperature, queue=queue, fused=None)
    assert value == pytest.approx(expected, rel=VALUE, abs=1e-30)
    assert (gradient - slopes).norm() <= GRADIENT * slopes.norm() + 1e-30


@pytest.mark.parametrize(
    ("pairs", "values"),
    [(1, 8), (2, 16), (5, 7), (33, 128), (64, 128), (65, 100), (130, 64), (70, 300)],
)
@pytest.mark.parametrize("apart", [math.inf, 0.3])
def test_any_size(pairs: int, values: int, apart: float) -> None:
    compare(*views(pairs, values, apart=apart), temperature=0.1)


@pytest.mark.parametrize("temperature", [0.01, 0.0249, 0.025, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("queued", [0, 1, 70])
def test_any_temperature_and_queue(temperature: float, queued: int) -> None:
    queue = drawn(queued, 32, seed=3)
    compare(*views(37, 32, apart=0.5), temperature=temperature, queue=queue)


@pytest.mark.parametrize("temperature", [0.005, 0.01])
def test_a_queue_of_the_anchors_at_low_temperatures(temperature: float) -> None:
    first, second = views(8, 16, apart=0.5)
    compare(first, second, temperature=temperature, queue=torch.cat([first, drawn(9, 16, seed=3)]))


@pytest.mark.slow
def test_the_widest_projection() -> None:
    compare(*views(20, 512, apart=1.0), temperature=0.1)


def test_several_bands_of_row_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 row tiles of 64 pairs, whose column sums are added in turns, the last one shorter.
    monkeypatch.setattr(kernels, "BAND", 4)
    compare(*views(5 * 64 - 5, 8, apart=0.5), temperature=0.2)


def test_saturated_views_keep_their_digits() -> None:
    # A loss of 1e-7, where the usual formula in float32 has none.
    first, second = views(64, 128, apart=0.05)
    value, _ = measured(first, second, temperature=0.05, fused="fp32")
    assert value < 1e-5
    compare(first, second, temperature=0.05)


def test_opposite_views_do_not_overflow() -> None:
    first = drawn(1, 16, seed=1).expand(40, 16).contiguous()
    for temperature in (0.025, 0.01):
        value, gradient = measured(first, -first, temperature=temperature, fused="fp32")
        expected, _ = measured(first, -first, temperature=temperature, fused=None)
        assert value == pytest.approx(expected, rel=VALUE)
        assert gradient.norm() < 1e-5  # nothing but rounding: all move along themselves


def test_identical_rows_and_zero_vectors() -> None:
    first, second = views(40, 24, apart=0.5)
    first[3:9] = first[2]
    second[5] = first[2]
    compare(first, second, temperature=0.1)
    first[7], second[11] = 0.0, 0.0
    # Where a length is held at 1e-6, a gradient is a million times larger: of those rows alone.
    compare(first, second, temperature=0.1)
    value, gradient = measured(first, second, temperature=0.1, fused="fp32")
    _, slopes = measured(first, second, temperature=0.1, fused=None)
    others = torch.ones(80, dtype=torch.bool)
    others[[7, 51]] = False
    assert (gradient - slopes)[others].norm() < GRADIENT * slopes[others].norm()
    assert math.isfinite(value)


def test_a_nan_is_not_lost() -> None:
    for temperature in (0.1, 0.01):
        first, second = views(40, 24, apart=0.5)
        first[17, 3] = math.nan
        value, gradient = measured(first, second, temperature=temperature, fused="fp32")
        assert math.isnan(value)
        assert gradient.isnan().all()


def test_rows_with_gaps_between_them() -> None:
    both = drawn(2 * 30, 40, seed=1)[:, 4:28]
    compare(both[:30], both[30:], temperature=0.1)


def test_two_runs_are_equal_to_the_bit() -> None:
    first, second = views(70, 48, apart=0.5)  # several tiles, the last ones in part
    queue = drawn(70, 48, seed=3)
    runs = [measured(first, second, temperature=0.1, queue=queue, fused="fp32") for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_what_cannot_be_computed_is_refused() -> None:
    first, second = views(4, 8, apart=1.0)
    with pytest.raises(ValueError, match="cosine"):
        nt_xent(first, second, normalise=False, fused="fp32")
    with pytest.raises(ValueError, match="float64"):
        nt_xent(first.double(), second.double(), fused="fp32")
    with pytest.raises(ValueError, match="512"):
        nt_xent(drawn(2, 513, seed=1), drawn(2, 513, seed=2), fused="fp32")
    leaf = first.to(DEVICE).requires_grad_()
    loss = nt_xent(leaf, second.to(DEVICE), fused="fp32")
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# --- ranks ---------------------------------------------------------------------------------------

PAIRS, VALUES = 12, 10


def share_of_loss(world: World, *, temperature: float, fused: str | None) -> list[Tensor]:
    kind = torch.float64 if fused is None else torch.float32
    leaves = [
        drawn(PAIRS, VALUES, seed=seed).chunk(world.size)[world.rank].to(kind).requires_grad_()
        for seed in (1, 2)
    ]
    queue = drawn(5, VALUES, seed=3).to(kind)
    loss = nt_xent(*leaves, temperature=temperature, queue=queue, fused=fused, world=world)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.skipif(DEVICE == "cuda", reason="interpreted on ranks of a CPU")
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_ranks_find_the_gradient_of_all(size: int, temperature: float) -> None:
    loss, *slopes = share_of_loss(ALONE, temperature=temperature, fused=None)
    parts = on_ranks(size, partial(share_of_loss, temperature=temperature, fused="fp32"))
    mean = sum(float(part[0]) for part in parts) / size
    assert mean == pytest.approx(float(loss), rel=VALUE)
    for place, expected in enumerate(slopes, 1):
        found = torch.cat([part[place] for part in parts]).double() / size
        assert (found - expected).norm() < GRADIENT * expected.norm()


# --- rounding ------------------------------------------------------------------------------------


def emulated(
    first: Tensor, second: Tensor, *, temperature: float, split: bool
) -> tuple[float, Tensor]:
    """The kernels' arithmetic in plain PyTorch, which rounds to 16 bits where they do."""

    def halves(values: Tensor) -> list[Tensor]:
        high = values.half().float()
        return [high, (values - high).half().float()]

    def multiply(left: list[Tensor], right: list[Tensor]) -> Tensor:
        product = left[0] @ right[0]
        return product + left[0] @ right[1] + left[1] @ right[0] if split else product

    rows = torch.cat([first, second]).float()
    pairs = len(first)
    units = unit_rows(rows)
    partner = units.roll(pairs, 0)
    positives = (units * partner).sum(1)
    scores = multiply(halves(units), [half.T for half in halves(units)])
    entries = ((scores - 1) / temperature).exp()
    image = torch.arange(2 * pairs) % pairs
    entries[image[:, None] == image[None, :]] = 0.0
    sums, own = entries.sum(1), ((positives - 1) / temperature).exp()
    losses, shares, weights = torch.log1p(sums / own), 1 / (sums + own), sums / (sums + own)
    boost = 2.0 ** (LARGEST_EXPONENT.value + math.floor(-math.log2(weights.max())))
    slopes = multiply(halves(entries * (shares[:, None] + shares[None, :]) * boost), halves(units))
    slopes /= boost
    slopes = (slopes - (weights + weights.roll(pairs))[:, None] * partner) / (temperature * pairs)
    slopes -= units * (units * slopes).sum(1, keepdim=True)
    return float(losses.sum() / pairs), (slopes / rows.norm(dim=1, keepdim=True)).double()


CASES = [
    pytest.param(math.inf, 0.1, id="unlike views"),
    pytest.param(0.3, 0.1, id="alike views"),
    pytest.param(0.42, 0.05, id="saturated"),  # a loss of 2e-4
]


@pytest.mark.parametrize(("apart", "temperature"), CASES)
@pytest.mark.parametrize(
    ("split", "bounds"), [(False, (BF16_VALUE, BF16_GRADIENT)), (True, (VALUE, GRADIENT))]
)
def test_the_arithmetic_of_a_gpu_emulated(
    apart: float, temperature: float, split: bool, bounds: tuple[float, float]
) -> None:
    first, second = views(1024, 128, apart=apart)
    value, gradient = emulated(first, second, temperature=temperature, split=split)
    expected, slopes = measured(first, second, temperature=temperature, fused=None, upstream=1.0)
    assert value == pytest.approx(expected, rel=bounds[0])
    assert (gradient - slopes).norm() < bounds[1] * slopes.norm()


@pytest.mark.parametrize(("apart", "temperature"), CASES)
@pytest.mark.parametrize(
    "pairs", [250, *(pytest.param(many, marks=pytest.mark.gpu) for many in (1000, 1024))]
)
def test_one_half_is_enough_for_bf16(pairs: int, apart: float, temperature: float) -> None:
    first, second = views(pairs, 128, apart=apart)
    value, gradient = measured(first, second, temperature=temperature, fused="bf16")
    expected, slopes = measured(first, second, temperature=temperature, fused=None)
    assert value == pytest.approx(expected, rel=BF16_VALUE)
    assert (gradient - slopes).norm() < BF16_GRADIENT * slopes.norm()


def test_at_low_temperatures_a_half_is_not_enough() -> None:
    first, second = views(37, 32, apart=0.5)
    value, gradient = measured(first, second, temperature=0.0249, fused="bf16")
    expected, slopes = measured(first, second, temperature=0.0249, fused="fp32")
    assert value == expected
    assert torch.equal(gradient, slopes)


@pytest.mark.gpu
@pytest.mark.parametrize(("apart", "temperature"), CASES)
@pytest.mark.parametrize("values", [64, 128, 256, 512])
def test_float32_grade_on_a_gpu(values: int, apart: float, temperature: float) -> None:
    compare(*views(1000, values, apart=apart), temperature=temperature)


@pytest.mark.gpu
def test_a_hundred_launches_are_equal_to_the_bit() -> None:
    first, second = views(2000, 128, apart=0.5)
    runs = [measured(first, second, temperature=0.1, fused="bf16") for _ in range(100)]
    assert all(run[0] == runs[0][0] and torch.equal(run[1], runs[0][1]) for run in runs)
