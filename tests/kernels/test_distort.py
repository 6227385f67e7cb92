"""The distortion in two kernels against the plain one in float64.

Views lie in [0, 1], so that a difference is one relative to the largest value.
"""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import make_views
from bigsimclr.augment.draws import Draws, draw_views
from bigsimclr.kernels.distort import distort, pack

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 3e-6
ROUNDING = 1e-6  # between two builds of the same kernel
FACTORS = ([0.0, 0.3, 1.0, 1.8],) * 3 + ([-0.5, -0.13, 0.0, 0.2],)
COLOURS = {
    "black": (0, 0, 0),
    "white": (1, 1, 1),
    "grey": (0.5, 0.5, 0.5),
    "red": (1, 0, 0),
    "yellow": (1, 1, 0),
    "blue": (0, 0, 1),
    "overshot": (1.2, 0.4, -0.1),
    "under zero": (-0.1, -0.3, -0.2),
}


def nothing(images: int, views: int = 1) -> Draws:
    """Draws that change nothing; the factors change nothing either."""
    shape = (views, images)
    return Draws(
        boxes=np.zeros((*shape, 4), np.int32),
        flip=np.zeros(shape, np.bool_),
        jitter=np.zeros(shape, np.bool_),
        order=np.tile(np.arange(4, dtype=np.uint8), (*shape, 1)),
        factors=np.tile(np.array([1, 1, 1, 0], np.float32), (*shape, 1)),
        grey=np.zeros(shape, np.bool_),
        blur=np.zeros(shape, np.bool_),
        sigma=np.ones(shape, np.float32),
    )


def everything(images: int, views: int = 1, seed: int = 0) -> Draws:
    """Draws in which every view is jittered and blurred, and some are flipped or grey."""
    settings = ViewSettings(
        image_size=32,
        colour_strength=1.0,
        colour_probability=1.0,
        grey_probability=0.3,
        blur_probability=1.0,
    )
    return draw_views(
        settings,
        seed=seed,
        epochs=np.zeros(images, np.int64),
        indices=np.arange(images),
        sizes=np.full((images, 2), 32, np.int32),
        views=views,
    )


def crops_of(images: int, height: int, width: int, views: int = 1) -> torch.Tensor:
    """Noise around [0, 1], as bicubic crops are, with the difficult colours in front."""
    generator = torch.Generator().manual_seed(height * width)
    crops = torch.rand(views, images, 3, height, width, generator=generator) * 1.2 - 0.1
    colours = torch.tensor(list(COLOURS.values())).T
    crops.flatten(3)[..., : len(COLOURS)] = colours
    return crops


def fused(crops: torch.Tensor, draws: Draws, radius: int) -> torch.Tensor:
    # Of crops only the blur's radius depends on the image size.
    settings = ViewSettings(image_size=20 * radius)
    return make_views(crops, draws, settings, device=DEVICE, fused=True).cpu()


def exact(crops: torch.Tensor, draws: Draws, radius: int) -> torch.Tensor:
    return make_views(crops.double(), draws, ViewSettings(image_size=20 * radius), device=CPU)


def assert_same(crops: torch.Tensor, draws: Draws, radius: int = 0) -> None:
    found = fused(crops, draws, radius)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, exact(crops, draws, radius), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("operation", range(4))
def test_each_operation_alone_at_its_extremes(operation: int) -> None:
    draws = nothing(4)
    draws.jitter[:] = True
    draws.factors[0, :, operation] = FACTORS[operation]
    assert_same(crops_of(4, 6, 7), draws)


def test_all_orders() -> None:
    draws = everything(12, views=2)
    orders = np.array(list(permutations(range(4))), np.uint8).reshape(2, 12, 4)
    draws = replace(draws, order=orders, grey=np.zeros_like(draws.grey))
    assert_same(crops_of(12, 6, 7, views=2), draws)


@pytest.mark.parametrize("corner", range(16))
def test_all_factors_at_their_extremes(corner: int) -> None:
    draws = everything(1, seed=corner)
    for operation in range(4):
        draws.factors[..., operation] = FACTORS[operation][3 * (corner >> operation & 1)]
    assert_same(crops_of(1, 6, 7), draws, radius=2)


@pytest.mark.parametrize("name", COLOURS)
def test_images_of_one_colour(name: str) -> None:
    crops = torch.tensor(COLOURS[name]).view(3, 1, 1).expand(1, 3, 3, 5, 5)
    assert_same(crops, everything(3), radius=1)


def test_a_crop_alone_is_clipped_and_flipped() -> None:
    crops = crops_of(2, 5, 9)
    draws = nothing(2)
    draws.flip[0, 1] = True
    found = fused(crops, draws, 3)
    assert torch.equal(found[0], crops[0, 0].clamp(0, 1))
    assert torch.equal(found[1], crops[0, 1].clamp(0, 1).flip(-1))


def test_grey_alone() -> None:
    draws = nothing(2)
    draws.grey[0, 1] = True
    assert_same(crops_of(2, 6, 7), draws)
    found = fused(crops_of(2, 6, 7), draws, 0)
    assert torch.equal(found[1, 0], found[1, 1])
    assert torch.equal(found[1, 0], found[1, 2])


@pytest.mark.parametrize("radius", [1, 3, 11])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 37), (33, 6), (1, 1)])
def test_blur_alone(height: int, width: int, radius: int) -> None:
    draws = nothing(4)
    draws.blur[:] = [[True, True, False, True]]
    draws.sigma[:] = [[0.1, 0.7, 1.0, 2.0]]
    draws.flip[0, 3] = True
    crops = torch.rand(1, 4, 3, height, width, generator=torch.Generator().manual_seed(0))
    assert_same(crops, draws, radius=radius)


@pytest.mark.parametrize("size", [8, 17, 32, pytest.param(45, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resize", ["tf2", "tf1"])
def test_views_from_pixels(size: int, resize: str) -> None:
    settings = ViewSettings(
        image_size=size,
        colour_strength=1.0,
        colour_probability=0.8,
        grey_probability=0.2,
        blur_probability=0.5,
        resize=resize,
    )
    generator = np.random.default_rng(1)
    pixels = torch.from_numpy(generator.integers(0, 256, (5, 3, 21, 26), dtype=np.uint8))
    draws = draw_views(
        settings,
        seed=3,
        epochs=np.zeros(5, np.int64),
        indices=np.arange(5),
        sizes=np.tile(np.array([21, 26], np.int32), (5, 1)),
    )
    assert draws.jitter.any()
    assert draws.blur.any()
    assert not draws.blur.all()
    found = make_views(pixels, draws, settings, device=DEVICE, fused=True)
    assert found.shape == (10, 3, size, size)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = make_views(pixels.double() / 255, draws, settings, device=CPU)
    np.testing.assert_allclose(found.cpu(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_views_of_224_pixels() -> None:
    assert_same(crops_of(2, 224, 224), everything(2), radius=11)


def test_one_view_of_one_image() -> None:
    assert_same(crops_of(1, 9, 9), everything(1), radius=2)


def test_no_view() -> None:
    assert fused(crops_of(0, 9, 9), nothing(0), 2).shape == (0, 3, 9, 9)


def test_any_strides_and_the_crops_stay() -> None:
    crops = crops_of(2, 6, 7, views=2)
    draws = everything(2, views=2)
    expected = fused(crops, draws, 2)
    before = crops.clone()
    assert torch.equal(fused(crops, draws, 2), expected)
    assert torch.equal(crops, before)
    for order in ((1, 0, 3, 2, 4), (0, 1, 3, 4, 2), (4, 3, 2, 1, 0)):
        back = [order.index(axis) for axis in range(5)]
        strided = crops.permute(order).contiguous().permute(back)
        found = fused(strided, draws, 2)
        # On a GPU other strides are other loads, and the sums of a mean in another order.
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_a_view_does_not_depend_on_its_batch() -> None:
    crops = crops_of(4, 9, 10, views=2)
    draws = everything(4, views=2)
    whole = fused(crops, draws, 2).unflatten(0, (2, 4))
    part = fused(crops[:, 1:3], draws.take(slice(1, 3)), 2).unflatten(0, (2, 2))
    torch.testing.assert_close(part, whole[:, 1:3], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("turn_of_contrast", range(4))
def test_nan_takes_the_pixel_or_with_contrast_the_channel(turn_of_contrast: int) -> None:
    crops = crops_of(2, 6, 7)
    crops[:, :, 1, 3, 4] = torch.nan
    draws = everything(2)
    others = [operation for operation in range(4) if operation != 1]
    draws.order[:] = [*others[:turn_of_contrast], 1, *others[turn_of_contrast:]]
    draws.jitter[0, 1] = False
    draws.grey[:] = False
    draws.sigma[:] = 2.0
    for radius in (0, 2):
        expected = exact(crops, draws, radius).isnan()
        assert expected.any()
        assert torch.equal(fused(crops, draws, radius).isnan(), expected)


def test_nan_spreads_as_far_as_a_tap_weighs_anything() -> None:
    crops = torch.full((1, 1, 3, 15, 15), 0.5)
    crops[..., 7, 7] = torch.nan
    draws = nothing(1)
    draws.blur[:] = True
    draws.sigma[:] = 0.4
    found = fused(crops, draws, 5).isnan()
    assert found[..., 4:11, 4:11].all()
    assert found.sum() == 3 * 7 * 7


@pytest.mark.parametrize(
    # The interpreter cuts to bf16 where a GPU rounds.
    "dtype",
    [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16],
)
def test_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    crops = crops_of(4, 9, 10)
    draws = everything(4)
    draws.blur[0, :2] = False
    settings = ViewSettings(image_size=40)
    found = make_views(crops, draws, settings, device=DEVICE, fused=True, dtype=dtype)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    half_a_step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        found.cpu().float(), fused(crops, draws, 2), rtol=half_a_step, atol=ROUNDING
    )
    plain = make_views(crops, draws, settings, device=DEVICE, dtype=dtype)
    assert plain.dtype == dtype
    assert plain.is_contiguous(memory_format=torch.channels_last)


def test_float64_takes_the_plain_path() -> None:
    crops = crops_of(3, 9, 9).double()
    draws = everything(3)
    settings = ViewSettings(image_size=40)
    found = make_views(crops, draws, settings, device=CPU, fused=True)
    assert found.dtype == torch.float64
    assert torch.equal(found, exact(crops, draws, 2))


def test_decisions_fit_float32() -> None:
    draws = everything(24)
    orders = np.array(list(permutations(range(4))), np.uint8)[None]
    packed = pack(
        flip=draws.flip,
        jitter=draws.jitter,
        order=orders,
        factors=draws.factors,
        grey=draws.grey,
        blur=draws.blur,
        sigma=draws.sigma,
    )
    assert packed.shape == (24, 6)
    assert packed.dtype == np.float32
    assert (packed[:, :4] == draws.factors[0]).all()
    assert (packed[:, 4] == draws.sigma[0]).all()
    code = packed[:, 5].astype(np.int64)
    assert (code == packed[:, 5]).all()
    turns = np.stack([code >> shift & 3 for shift in (4, 6, 8, 10)], axis=1)
    assert (turns == orders[0]).all()
    assert (np.take_along_axis(turns, (code >> 12)[:, None], axis=1) == 1).all()


@pytest.mark.parametrize(
    ("crops", "decisions", "radius", "complaint"),
    [
        ((2, 3, 8, 8), (2, 6), 1, "crops must be"),
        ((1, 2, 1, 8, 8), (2, 6), 1, "crops must be"),
        ((1, 2, 3, 8, 8), (3, 6), 1, "decisions must be"),
        ((1, 2, 3, 8, 8), (2, 6), -1, "radius"),
    ],
)
def test_other_shapes_are_refused(
    crops: tuple[int, ...], decisions: tuple[int, ...], radius: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        distort(torch.zeros(crops), torch.zeros(decisions), radius=radius)


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    draws = everything(4, views=2)
    packed = pack(
        flip=draws.flip,
        jitter=draws.jitter,
        order=draws.order,
        factors=draws.factors,
        grey=draws.grey,
        blur=draws.blur,
        sigma=draws.sigma,
    )
    decisions = torch.zeros(8, 6, device="cuda")
    crops = crops_of(4, 224, 224, views=2).cuda()
    distort(crops, decisions, radius=11)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = distort(crops, decisions, radius=11)
    decisions.copy_(torch.from_numpy(packed))
    graph.replay()
    assert torch.equal(found, distort(crops, decisions, radius=11))
    torch.testing.assert_close(
        found.cpu().double(), exact(crops.cpu(), draws, 11), rtol=0, atol=TOLERANCE
    )
