"""The draws are pure, frozen, independent by slot, and stay inside the image."""

from dataclasses import fields, replace

import numpy as np
import pytest
from scipy.stats import chisquare

from bigsimclr.augment import ViewSettings, view_settings
from bigsimclr.augment.draws import Draws, centre_boxes, centre_draws, draw_views
from bigsimclr.recipe.sections import CropFlip, Distort

SETTINGS = ViewSettings(
    image_size=32,
    colour_strength=0.5,
    colour_probability=0.8,
    grey_probability=0.2,
    blur_probability=0.5,
)


def draw(settings=SETTINGS, *, seed=0, epoch=0, indices=range(64), size=(40, 60), views=2):
    indices = np.array(indices, np.int64)
    return draw_views(
        settings,
        seed=seed,
        epochs=np.full(len(indices), epoch, np.int64),
        indices=indices,
        sizes=np.tile(np.array(size, np.int32), (len(indices), 1)),
        views=views,
    )


def same(first, second):
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name))
        for field in fields(Draws)
    )


def test_shapes_and_types():
    draws = draw()
    found = {
        f.name: (getattr(draws, f.name).shape, getattr(draws, f.name).dtype.name)
        for f in fields(Draws)
    }
    assert found == {
        "boxes": ((2, 64, 4), "int32"),
        "flip": ((2, 64), "bool"),
        "jitter": ((2, 64), "bool"),
        "order": ((2, 64, 4), "uint8"),
        "factors": ((2, 64, 4), "float32"),
        "grey": ((2, 64), "bool"),
        "blur": ((2, 64), "bool"),
        "sigma": ((2, 64), "float32"),
    }
    assert (draws.views, draws.images) == (2, 64)


def test_an_image_draws_the_same_in_any_batch():
    together = draw(indices=[3, 9, 4, 1000])
    assert same(together.take(slice(1, 3)), draw(indices=[9, 4]))
    alone = [draw(indices=[index]) for index in (3, 9, 4, 1000)]
    assert same(Draws.stack(alone), together)
    first_view = draw(indices=[3, 9, 4, 1000], views=1)
    assert np.array_equal(first_view.boxes[0], together.boxes[0])


def test_seed_epoch_index_and_view_all_matter():
    base = draw()
    for other in (draw(seed=1), draw(epoch=1), draw(indices=range(64, 128))):
        assert (base.boxes != other.boxes).any(axis=-1).mean() > 0.9
        assert (base.factors != other.factors).all(axis=-1).mean() > 0.9
    assert (base.boxes[0] != base.boxes[1]).any(axis=-1).mean() > 0.9


def test_a_setting_moves_only_its_own_draws():
    base = draw()
    for change, touched in [
        ({"blur_probability": 0.1}, {"blur"}),
        ({"flip_probability": 0.0}, {"flip"}),
        ({"grey_probability": 1.0}, {"grey"}),
        ({"colour_probability": 0.1}, {"jitter"}),
        ({"colour_strength": 1.0}, {"factors"}),
        ({"crop_area": (0.5, 1.0)}, {"boxes"}),
    ]:
        other = draw(replace(SETTINGS, **change))
        moved = {
            field.name
            for field in fields(Draws)
            if not np.array_equal(getattr(base, field.name), getattr(other, field.name))
        }
        assert moved == touched


def test_probabilities():
    count = 4000
    draws = draw(indices=range(count), views=1)
    for found, expected in [
        (draws.flip, 0.5),
        (draws.jitter, 0.8),
        (draws.grey, 0.2),
        (draws.blur, 0.5),
        (draws.jitter | draws.grey, 0.84),
    ]:
        assert abs(found.mean() - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_certain_and_impossible_events():
    always = ViewSettings(
        image_size=8,
        flip_probability=1.0,
        colour_strength=1.0,
        colour_probability=1.0,
        grey_probability=1.0,
        blur_probability=1.0,
    )
    draws = draw(always)
    assert draws.flip.all()
    assert draws.jitter.all()
    assert draws.grey.all()
    assert draws.blur.all()
    never = draw(ViewSettings(image_size=8, flip_probability=0.0))
    assert not (never.flip | never.jitter | never.grey | never.blur).any()
    assert not draw(replace(always, colour_strength=0.0)).jitter.any()


def test_every_order_of_the_operations_is_equally_likely():
    draws = draw(indices=range(4800), views=1)
    order = draws.order[0].astype(np.int64)
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(order @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0, 2.0])
def test_factors_fill_their_range(strength):
    factors = draw(replace(SETTINGS, colour_strength=strength), indices=range(2000)).factors
    low, high = max(1 - 0.8 * strength, 0), 1 + 0.8 * strength
    for operation in range(3):
        assert low <= factors[..., operation].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factors[..., operation].max() <= high
    assert 0.197 * strength < np.abs(factors[..., 3]).max() <= 0.2 * strength + 1e-7
    assert factors[..., 3].min() < 0 < factors[..., 3].max()


def test_sigma_fills_its_range():
    sigma = draw(indices=range(2000)).sigma
    assert 0.1 <= sigma.min() < 0.11
    assert 1.99 < sigma.max() <= 2.0


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 9), (2, 3), (8, 8), (32, 32), (427, 640), (10, 400), (300, 5)]
)
@pytest.mark.parametrize("area", [(0.1, 1.0), (0.5, 0.6), (1.0, 1.0), (0.01, 0.02)])
def test_boxes_lie_inside_the_image_and_obey_the_limits(size, area):
    draws = draw(replace(SETTINGS, crop_area=area), size=size)
    y, x, height, width = np.moveaxis(draws.boxes, -1, 0).astype(np.int64)
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (height > 0).all()
    assert (width > 0).all()
    assert (y + height <= size[0]).all()
    assert (x + width <= size[1]).all()
    share = height * width / (size[0] * size[1])
    whole = share == 1
    assert ((share >= area[0] - 1e-6) & (share <= area[1] + 1e-6) | whole).all()
    # A side is rounded to a pixel, so the aspect may miss its limits by one.
    assert ((width + 0.5 >= 0.75 * height) & (width - 0.5 <= 4 / 3 * height) | whole).all()


# Frozen: another draw would change every published run.
def test_the_draws_are_frozen():
    draws = draw(seed=7, epoch=3, indices=[0, 1, 12345])
    assert draws.boxes.tolist() == [
        [[15, 20, 18, 20], [0, 2, 28, 34], [4, 32, 29, 25]],
        [[4, 38, 19, 19], [1, 12, 36, 36], [5, 26, 28, 27]],
    ]
    assert draws.flip.tolist() == [[True, False, True], [True, True, False]]
    assert draws.jitter.tolist() == [[False, True, True], [True, True, True]]
    assert draws.order.tolist() == [
        [[0, 1, 3, 2], [2, 0, 1, 3], [2, 0, 3, 1]],
        [[1, 2, 0, 3], [2, 1, 3, 0], [1, 2, 0, 3]],
    ]
    assert draws.grey.tolist() == [[False, False, False], [False, False, False]]
    assert draws.blur.tolist() == [[False, True, True], [False, True, False]]
    assert [value.hex() for value in draws.sigma.reshape(-1).tolist()] == [
        "0x1.a654b20000000p-4",
        "0x1.9a905c0000000p-2",
        "0x1.aa6bb60000000p+0",
        "0x1.3ffd440000000p+0",
        "0x1.6938a00000000p-1",
        "0x1.d6d4940000000p-3",
    ]
    assert [value.hex() for value in draws.factors[:, 0].reshape(-1).tolist()] == [
        "0x1.36368c0000000p+0",
        "0x1.3bc9c20000000p+0",
        "0x1.b5cf9e0000000p-1",
        "-0x1.788f200000000p-4",
        "0x1.bec1960000000p-1",
        "0x1.4f541e0000000p+0",
        "0x1.2d02a00000000p+0",
        "-0x1.e26bce0000000p-6",
    ]


@pytest.mark.parametrize(
    ("image_size", "size", "box"),
    [
        (224, (427, 640), [27, 133, 374, 374]),
        (224, (640, 427), [133, 27, 374, 374]),
        (64, (64, 64), [4, 4, 56, 56]),
        (32, (32, 32), [0, 0, 32, 32]),
        (16, (8, 8), [0, 0, 8, 8]),
        (32, (80, 64), [12, 4, 56, 56]),
        (64, (1, 1), [0, 0, 1, 1]),
    ],
)
def test_centre_crop(image_size, size, box):
    draws = centre_draws(ViewSettings(image_size=image_size), np.array([size], np.int32))
    assert draws.boxes.tolist() == [[box]]
    assert draws.boxes.dtype == np.int32
    assert not (draws.flip | draws.jitter | draws.grey | draws.blur).any()
    assert draws.factors.tolist() == [[[1, 1, 1, 0]]]


def test_centre_crop_of_another_aspect():
    boxes = centre_boxes(np.array([[80, 64], [100, 400]], np.int32), 0.5, aspect=2.0)
    assert boxes.tolist() == [[32, 16, 16, 32], [25, 150, 50, 100]]


def test_settings_follow_the_section():
    plain = view_settings(CropFlip(image_size=16, resize="tf1", crop_area=(0.2, 0.9)))
    assert plain == ViewSettings(image_size=16, resize="tf1", crop_area=(0.2, 0.9))
    distort = view_settings(Distort(image_size=32, colour_strength=0.5, blur_probability=0.0))
    assert distort == replace(SETTINGS, blur_probability=0.0)
