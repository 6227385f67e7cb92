"""Colour operations against one-pixel references in float64."""

import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch

from bigsimclr.augment.colour import brightness_, contrast_, grey, hue_, jitter_, saturation_

OPERATIONS = (brightness_, contrast_, saturation_, hue_)


def images_of(count, side=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, side, side, generator=generator, dtype=dtype)
    # Black, white, grey and the pure colours are where hue and saturation go wrong.
    special = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    for position, colour in enumerate(special):
        row, column = divmod(position, side)
        images[:, :, row, column] = torch.tensor(colour, dtype=dtype)
    return images


def slow_operation(image, operation, factor):
    """One image [3,H,W] by the definition, pixel by pixel, unclipped."""
    image = np.asarray(image, np.float64)
    if operation == 0:
        return image * factor
    if operation == 1:
        mean = image.mean((1, 2), keepdims=True)
        return (image - mean) * factor + mean
    result = np.empty_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column])
            if operation == 2:
                saturation = min(max(saturation * factor, 0), 1)
            else:
                hue = (hue + factor) % 1
            result[:, row, column] = colorsys.hsv_to_rgb(hue, saturation, value)
    return result


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_image_has_its_own_factor(operation, dtype):
    factors = [0.0, 0.3, 1.0, 1.8] if operation < 3 else [-0.5, -0.13, 0.0, 0.2]
    images = images_of(4, dtype=dtype)
    expected = [
        slow_operation(image, operation, factor)
        for image, factor in zip(images, factors, strict=True)
    ]
    found = OPERATIONS[operation](images, torch.tensor(factors, dtype=dtype))
    assert found.data_ptr() == images.data_ptr()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(found, np.stack(expected), atol=tolerance)


def test_saturation_and_hue_bear_overshoot():
    # Outside [0, 1] the definition in terms of value and range still holds.
    pixel = torch.tensor([1.2, 0.4, -0.1], dtype=torch.float64).view(1, 3, 1, 1)
    full = saturation_(pixel.clone(), torch.tensor([1.0], dtype=torch.float64))
    # Saturation is 1.3 / 1.2, clipped to 1: the smallest channel becomes 0.
    np.testing.assert_allclose(full.flatten(), [1.2, 1.2 * (1 - 0.8 / 1.3), 0.0], atol=1e-12)
    third = hue_(pixel.clone(), torch.tensor([1 / 3], dtype=torch.float64))
    np.testing.assert_allclose(third.flatten(), [-0.1, 1.2, 0.4], atol=1e-12)
    dark = torch.tensor([-0.1, -0.3, -0.2], dtype=torch.float64).view(1, 3, 1, 1)
    assert saturation_(dark, torch.tensor([1.5], dtype=torch.float64)).max() <= 0


def test_grey_weights():
    images = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1)
    np.testing.assert_allclose(grey(images).flatten(), [0.2989, 0.5870, 0.1140], atol=1e-12)


def test_jitter_applies_every_order_to_its_own_image():
    orders = np.array(list(permutations(range(4))), np.uint8)
    generator = np.random.default_rng(0)
    factors = np.empty((24, 4), np.float32)
    factors[:, :3] = generator.uniform(0.2, 1.8, (24, 3))
    factors[:, 3] = generator.uniform(-0.2, 0.2, 24)
    images = images_of(30)
    rows = generator.permutation(30)[:24]
    expected = images.numpy().copy()
    for row, order, factor in zip(rows, orders, factors, strict=True):
        for operation in order:
            changed = slow_operation(expected[row], operation, float(factor[operation]))
            expected[row] = changed.clip(0, 1)
    found = jitter_(images, rows, order=orders, factors=factors)
    assert found.data_ptr() == images.data_ptr()
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_jitter_of_no_image_changes_nothing():
    images = images_of(2)
    before = images.clone()
    none = np.zeros(0, np.int64)
    jitter_(
        images,
        none,
        order=np.zeros((0, 4), np.uint8),
        factors=np.zeros((0, 4), np.float32),
    )
    assert torch.equal(images, before)


def test_an_image_is_jittered_alike_in_any_batch():
    images = images_of(6, dtype=torch.float32)
    order = np.array([[3, 1, 0, 2]] * 6, np.uint8)
    order[::2] = [2, 0, 3, 1]
    factors = np.tile(np.array([0.7, 1.3, 1.6, 0.1], np.float32), (6, 1))
    alone = images[4:5].clone()
    jitter_(images, np.arange(6), order=order, factors=factors)
    jitter_(alone, np.array([0]), order=order[4:5], factors=factors[4:5])
    assert torch.equal(alone[0], images[4])
