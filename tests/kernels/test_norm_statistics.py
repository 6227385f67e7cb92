"""Batch statistics by the kernels against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bigsimclr.kernels.norm_statistics import MEASURE, Matrix, Tiles, batch_statistics, suits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows and channels that fill no tile, fill one, and need several of them.
SHAPES = [(1, 1), (2, 3), (700, 5), (33, 64), (90, 130), (2, 3, 5, 7), (3, 66, 1, 1), (1, 8, 9, 2)]


def drawn(*shape: int, seed: int = 0, mean: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * 3 + mean).to(DEVICE)
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def exact(inputs: Tensor) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    variance, mean = torch.var_mean(inputs.double(), axes, correction=0)
    return mean, variance


def errors(inputs: Tensor, tiles: Tiles = MEASURE) -> tuple[float, float]:
    """Errors of the mean, relative to the largest value, and of each variance."""
    mean, variance = batch_statistics(inputs, tiles)
    assert mean.dtype == variance.dtype == torch.float32
    expected_mean, expected_variance = exact(inputs)
    of_mean = (mean - expected_mean).abs().max() / inputs.abs().max()
    of_variance = (variance - expected_variance).abs() / expected_variance.clamp_min(1e-30)
    return float(of_mean), float(of_variance.max())


@pytest.mark.parametrize("shape", SHAPES)
def test_of_one_and_of_several_tiles(shape: tuple[int, ...]) -> None:
    of_mean, of_variance = errors(drawn(*shape))
    assert of_mean < 2e-7
    assert of_variance < 1e-6


@pytest.mark.parametrize("programs", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [32 * 7, 32 * 6 + 1, 32 * 8 + 31])
def test_tiles_are_shared_by_programs(rows: int, programs: int) -> None:
    tiles = replace(MEASURE, programs=2 * programs)
    inputs = drawn(rows, 70)
    assert Matrix.of(inputs, tiles).programs == programs < Matrix.of(inputs, tiles).tiles
    of_mean, of_variance = errors(inputs, tiles)
    assert of_mean < 2e-7
    assert of_variance < 1e-6


# Means are float32 too: at 100,000 their last digit is 0.3 % of this deviation.
@pytest.mark.parametrize(("mean", "tolerance"), [(1e2, 1e-6), (1e3, 2e-6), (1e5, 2e-4)])
def test_far_from_zero(mean: float, tolerance: float) -> None:
    of_mean, of_variance = errors(drawn(2500, 6, mean=mean), replace(MEASURE, programs=2))
    assert of_mean < 1e-7
    assert of_variance < tolerance


@pytest.mark.parametrize("outlier", [1e3, 1e6])
def test_of_a_first_value_unlike_all_others(outlier: float) -> None:
    inputs = drawn(3000, 6)
    inputs[0] = outlier
    of_mean, of_variance = errors(inputs, replace(MEASURE, programs=1))
    assert of_mean < 1e-7
    assert of_variance < 2e-6


def test_of_rows_that_are_all_alike() -> None:
    inputs = drawn(1, 20).expand(700, 20).contiguous()
    mean, variance = batch_statistics(inputs)
    torch.testing.assert_close(mean, inputs[0], rtol=2e-7, atol=0)
    assert float((variance / inputs[0].square()).max()) < 1e-12
    assert batch_statistics(torch.zeros_like(inputs))[1].max() == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_shows_in_its_channel_alone() -> None:
    inputs = drawn(700, 6)
    inputs[650, 2] = torch.nan
    inputs[3, 4] = torch.inf
    mean, variance = batch_statistics(inputs)
    assert variance.isnan().tolist() == [False, False, True, False, True, False]
    assert mean.isfinite().tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize(("rows", "channels"), [(1, 3), (700, 5), (90, 130), (32 * 9, 700)])
def test_running_statistics_are_moved_as_by_pytorch(rows: int, channels: int) -> None:
    inputs = drawn(rows, channels)
    running = drawn(channels, seed=1), drawn(channels, seed=2).square()
    versions = [values._version for values in running]
    expected = [values.clone() for values in running]
    kept = batch_statistics(inputs)
    found = batch_statistics(inputs, running=running, momentum=0.1)
    for one, other, moved, values in zip(found, kept, running, expected, strict=True):
        assert torch.equal(one, other)
        # One rounding of the largest number on the way: the interpreter rounds the product too.
        bound = torch.finfo(torch.float32).eps * torch.maximum(one.abs(), values.abs())
        values.lerp_(one, 0.1)
        assert bool(((moved - values).abs() <= bound).all())
    assert [values._version for values in running] == [version + 1 for version in versions]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_running_statistics_that_stay_or_jump(momentum: float) -> None:
    inputs = drawn(90, 130)
    running = torch.zeros(130, device=DEVICE), torch.zeros(130, device=DEVICE)
    found = batch_statistics(inputs, running=running, momentum=momentum)
    for one, moved in zip(found, running, strict=True):
        assert torch.equal(moved, momentum * one)


def test_running_statistics_that_do_not_fit_are_refused() -> None:
    inputs, fitting = drawn(8, 3), torch.zeros(3, device=DEVICE)
    for wrong, what in (
        (torch.zeros(4, device=DEVICE), r"is \[4\] for inputs of 3 channels"),
        (torch.zeros(6, device=DEVICE)[::2], r"is \[3\] for inputs of 3 channels"),
        (fitting.double(), "in float32, not in torch.float64"),
    ):
        for running in ((wrong, fitting), (fitting, wrong)):
            with pytest.raises(ValueError, match=what):
                batch_statistics(inputs, running=running, momentum=0.1)
    assert not fitting.any()


def test_the_same_bits_twice() -> None:
    inputs = drawn(5, 66, 7, 9)
    first, second = batch_statistics(inputs), batch_statistics(inputs.clone())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(4, 3, dtype=torch.float64),
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4).transpose(1, 2),
        torch.zeros(3, 4).T,
        torch.zeros(0, 4),
    ],
    ids=["float64", "channels not last", "three axes", "columns", "nothing"],
)
def test_what_the_kernels_do_not_take(inputs: Tensor) -> None:
    assert not suits(inputs)
    with pytest.raises(ValueError, match="the kernels take"):
        batch_statistics(inputs)


def test_tiles_fill_an_h100_for_all_of_the_networks_shapes() -> None:
    for side, channels in [(112, 64), (56, 64), (56, 256), (28, 512), (14, 1024), (7, 6144)]:
        matrix = Matrix(128 * side * side, channels, MEASURE)
        assert 3.6 * 132 <= matrix.programs * matrix.strips <= 4 * 132
        assert matrix.tile_rows * matrix.tile_columns == 2048


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    of_mean, of_variance = errors(drawn(16, 128, 56, 56).to(dtype))
    assert of_mean < 2e-7
    assert of_variance < 1e-6
