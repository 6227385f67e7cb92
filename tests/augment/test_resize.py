"""Both bicubic kernels against a slow reference, on the host and on the device."""

import math

import numpy as np
import pytest
import torch

from bigsimclr.augment.device import crop_resize
from bigsimclr.augment.host import crop_resize_one
from bigsimclr.augment.resize import taps


def slow_row(length, size, resize):
    """Weights [size, length] in float64, written from the definition."""
    a = -0.5 if resize == "tf2" else -0.75

    def kernel(distance):
        if distance <= 1:
            return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a

    matrix = np.zeros((size, length))
    for i in range(size):
        scale = np.float32(length) / np.float32(size)
        if resize == "tf2":
            source = np.float32((np.float32(i) + np.float32(0.5)) * scale) - np.float32(0.5)
        else:
            source = np.float32(i) * scale
        floor = math.floor(source)
        fraction = round(float(source - floor) * 1024) / 1024
        for offset in range(-1, 3):
            weight = kernel(abs(offset - fraction))
            if 0 <= floor + offset < length:
                matrix[i, floor + offset] += weight
            elif resize == "tf1":
                matrix[i, min(max(floor + offset, 0), length - 1)] += weight
        if resize == "tf2":
            matrix[i] /= matrix[i].sum()
    return matrix


def slow_crop_resize(image, box, size, resize):
    y, x, height, width = box
    crop = image[y : y + height, x : x + width].astype(np.float64) / 255
    rows = slow_row(height, size[0], resize)
    columns = slow_row(width, size[1], resize)
    return np.einsum("ih,hwc,jw->cij", rows, crop, columns)


def crop_of(image, box, size, resize):
    found = torch.empty(3, *size)
    crop_resize_one(image, np.array(box, np.int32), resize, out=found)
    return found.numpy()


LENGTHS = [1, 2, 3, 4, 5, 8, 16, 31, 100]


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_taps_are_the_kernel(size, resize):
    first, weight = taps(np.array(LENGTHS), size, resize)
    assert first.shape == (len(LENGTHS), size)
    assert first.min() >= -2
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-6)
    for row, length in enumerate(LENGTHS):
        dense = np.zeros((size, length + 5))
        for i in range(size):
            dense[i, first[row, i] + 2 : first[row, i] + 6] = weight[row, i]
        assert (dense[:, :2] == 0).all()
        assert (dense[:, length + 2 :] == 0).all()
        expected = slow_row(length, size, resize)
        np.testing.assert_allclose(dense[:, 2 : length + 2], expected, atol=2e-7)


def image_of(height, width, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 20, 30), (8, 8)),
        ((3, 5, 7, 9), (16, 16)),
        ((19, 29, 1, 1), (4, 4)),
        ((0, 28, 20, 2), (5, 7)),
        ((2, 2, 12, 12), (12, 12)),
    ],
)
def test_one_image_on_the_host(box, size, resize):
    image = image_of(20, 30)
    found = crop_of(image, box, size, resize)
    np.testing.assert_allclose(found, slow_crop_resize(image, box, size, resize), atol=1e-6)


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
def test_the_same_size_is_the_identity(resize):
    image = image_of(9, 9)
    found = crop_of(image, [0, 0, 9, 9], (9, 9), resize)
    np.testing.assert_allclose(found, image.transpose(2, 0, 1) / np.float32(255), atol=1e-7)


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
def test_a_batch_on_the_device(resize):
    images = np.stack([image_of(12, 10, seed) for seed in range(3)])
    boxes = np.array(
        [
            [[0, 0, 12, 10], [3, 2, 4, 5], [11, 9, 1, 1]],
            [[0, 0, 1, 10], [5, 5, 7, 5], [2, 0, 8, 8]],
        ],
        np.int32,
    )
    flip = np.array([[True, False, True], [False, True, True]])
    size = (6, 7)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = []
    for view in range(2):
        for row in range(3):
            one = slow_crop_resize(images[row], boxes[view, row], size, resize)
            expected.append(one[..., ::-1] if flip[view, row] else one)
    single = crop_resize(pixels, boxes, size, resize, flip=flip)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, atol=1e-6)
    double = crop_resize(pixels.double() / 255, boxes, size, resize, flip=flip)
    assert double.dtype == torch.float64
    np.testing.assert_allclose(double, expected, atol=3e-7)


def test_overshoot_is_kept():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 2:] = 255
    found = crop_of(image, [0, 0, 4, 4], (8, 8), "tf2")
    assert found.min() < 0
    assert found.max() > 1
