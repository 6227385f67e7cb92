"""Whole views against a slow composition of one image at a time."""

import numpy as np
import pytest
import torch

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.colour import brightness_, contrast_, grey, hue_, saturation_
from bigsimclr.augment.device import blur, crop_resize, make_views
from bigsimclr.augment.draws import centre_draws, draw_views
from bigsimclr.augment.host import crop_resize_one

CPU = torch.device("cpu")
OPERATIONS = (brightness_, contrast_, saturation_, hue_)
SETTINGS = ViewSettings(
    image_size=32,
    colour_strength=1.0,
    colour_probability=0.8,
    grey_probability=0.3,
    blur_probability=0.5,
)


def batch(count=12, side=20, settings=SETTINGS, views=2):
    generator = np.random.default_rng(1)
    pixels = torch.from_numpy(generator.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
    draws = draw_views(
        settings,
        seed=5,
        epochs=np.zeros(count, np.int64),
        indices=np.arange(count),
        sizes=np.full((count, 2), side, np.int32),
        views=views,
    )
    return pixels, draws


def slow_blur(image, sigma, radius):
    distance = np.arange(-radius, radius + 1)
    kernel = np.exp(-(distance**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)))
    rows = sum(weight * padded[:, k : k + height] for k, weight in enumerate(kernel))
    return sum(weight * rows[:, :, k : k + width] for k, weight in enumerate(kernel))


def slow_view(pixels, draws, settings, view, row):
    """One view of one image in float64, step by step in the official order."""
    size = (settings.image_size, settings.image_size)
    box = draws.boxes[view, row][None, None]
    image = crop_resize(pixels[row : row + 1].double() / 255, box, size, settings.resize)
    if draws.flip[view, row]:
        image = image.flip(-1)
    if draws.jitter[view, row]:
        for operation in draws.order[view, row]:
            factor = torch.tensor([draws.factors[view, row, operation]], dtype=torch.float64)
            image = OPERATIONS[operation](image, factor).clamp(0, 1)
    if draws.grey[view, row]:
        image = grey(image).expand(-1, 3, -1, -1)
    found = image.clamp(0, 1)[0].numpy()
    if draws.blur[view, row]:
        sigma = float(draws.sigma[view, row])
        found = slow_blur(found, sigma, settings.image_size // 10 // 2).clip(0, 1)
    return found


@pytest.mark.parametrize("image_size", [16, 32, 50])
@pytest.mark.parametrize("resize", ["tf2", "tf1"])
def test_views_follow_the_official_order(image_size, resize):
    settings = ViewSettings(**{**vars(SETTINGS), "image_size": image_size, "resize": resize})
    pixels, draws = batch(settings=settings)
    expected = np.stack(
        [slow_view(pixels, draws, settings, view, row) for view in range(2) for row in range(12)]
    )
    single = make_views(pixels, draws, settings, device=CPU)
    assert single.dtype == torch.float32
    assert single.shape == (24, 3, image_size, image_size)
    assert single.is_contiguous(memory_format=torch.channels_last)
    assert not single.requires_grad
    np.testing.assert_allclose(single, expected, atol=2e-5)
    double = make_views(pixels.double() / 255, draws, settings, device=CPU)
    assert double.dtype == torch.float64
    np.testing.assert_allclose(double, expected, atol=1e-9)


def test_views_cropped_on_the_host_are_the_same_views():
    pixels, draws = batch()
    host = torch.empty(2, 12, 3, 32, 32)
    for view, row in np.ndindex(2, 12):
        image = pixels[row].permute(1, 2, 0).numpy()
        crop_resize_one(image, draws.boxes[view, row], "tf2", out=host[view, row])
    before = host.clone()
    found = make_views(host, draws, SETTINGS, device=CPU)
    np.testing.assert_allclose(found, make_views(pixels, draws, SETTINGS, device=CPU), atol=2e-5)
    assert torch.equal(host, before)


def test_a_view_does_not_depend_on_its_batch():
    pixels, draws = batch()
    whole = make_views(pixels, draws, SETTINGS, device=CPU).unflatten(0, (2, 12))
    part = make_views(pixels[3:7], draws.take(slice(3, 7)), SETTINGS, device=CPU)
    np.testing.assert_allclose(part.unflatten(0, (2, 4)), whole[:, 3:7], atol=1e-6)


def test_crop_and_flip_alone_are_clipped():
    settings = ViewSettings(image_size=32)
    pixels, draws = batch(settings=settings, views=1)
    found = make_views(pixels, draws, settings, device=CPU)
    raw = crop_resize(pixels, draws.boxes, (32, 32), "tf2", flip=draws.flip)
    assert raw.min() < 0
    assert raw.max() > 1
    assert torch.equal(found, raw.clamp(0, 1))


def test_evaluation_takes_the_centre():
    settings = ViewSettings(image_size=40)
    pixels, _ = batch(side=48)
    draws = centre_draws(settings, np.full((12, 2), 48, np.int32))
    found = make_views(pixels, draws, settings, device=CPU)
    box = np.array([3, 3, 42, 42], np.int32)
    expected = torch.empty(3, 40, 40)
    crop_resize_one(pixels[5].permute(1, 2, 0).numpy(), box, "tf2", out=expected)
    np.testing.assert_allclose(found[5], expected.clip(0, 1), atol=1e-6)


def test_small_square_images_are_evaluated_whole():
    settings = ViewSettings(image_size=20)
    pixels, _ = batch(side=20)
    draws = centre_draws(settings, np.full((12, 2), 20, np.int32))
    found = make_views(pixels, draws, settings, device=CPU)
    np.testing.assert_allclose(found, pixels / 255, atol=1e-7)


def test_blur_pads_with_zeros_and_keeps_the_middle():
    flat = torch.ones(2, 3, 15, 15, dtype=torch.float64)
    found = blur(flat, torch.tensor([0.1, 2.0], dtype=torch.float64), radius=3)
    np.testing.assert_allclose(found[0], 1, atol=1e-12)
    np.testing.assert_allclose(found[1, :, 7, 7], 1, atol=1e-12)
    assert (found[1, :, 0, 0] < 0.5).all()


def test_torchs_own_generator_is_not_touched():
    before = torch.get_rng_state()
    pixels, draws = batch(count=2)
    make_views(pixels, draws, SETTINGS, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_coarsen_views():
    pixels, draws = batch(count=4)
    expected = make_views(pixels, draws, SETTINGS, device=CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_views(pixels, draws, SETTINGS, device=CPU)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_makes_the_same_views():
    pixels, draws = batch()
    pixels = pixels.double() / 255
    expected = make_views(pixels, draws, SETTINGS, device=CPU)
    found = make_views(pixels, draws, SETTINGS, device=torch.device("cuda"))
    np.testing.assert_allclose(found.cpu(), expected, atol=1e-9)
