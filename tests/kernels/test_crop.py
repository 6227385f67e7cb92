"""The crop in one kernel against the plain one in float64.

Pixels lie in [0, 1], so that a difference is one relative to the largest value.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import crop_resize, make_views
from bigsimclr.augment.draws import centre_draws, draw_views
from bigsimclr.augment.resize import Resize, tap_table, taps
from bigsimclr.kernels.crop import TILE, Tile, crop, pack

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 5e-7  # four roundings of 1
ROUNDING = 2.5e-7  # between two builds of the kernel
SMALL = Tile(rows=4, columns=8, warps=1)

Boxes = npt.NDArray[np.int32]


def bytes_of(images: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    shape = (images, 3, height, width)
    return torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))


def boxes_of(*boxes: Sequence[int], views: int = 1) -> Boxes:
    """Return boxes [V,B,4], view after view."""
    return np.array(boxes, np.int32).reshape(views, -1, 4)


def random_boxes(views: int, images: int, height: int, width: int) -> Boxes:
    generator = np.random.default_rng(height * width)
    rows = generator.integers(1, height + 1, (views, images))
    columns = generator.integers(1, width + 1, (views, images))
    y = generator.integers(0, height - rows + 1)
    x = generator.integers(0, width - columns + 1)
    return np.stack([y, x, rows, columns], axis=-1).astype(np.int32)


def fused(
    pixels: torch.Tensor,
    boxes: Boxes,
    size: tuple[int, int],
    resize: Resize = "tf2",
    *,
    flip: npt.NDArray[np.bool_] | None = None,
    tile: Tile = TILE,
) -> torch.Tensor:
    """Crop by the kernel; [V,B,3,H,W] on the CPU."""
    height, width = pixels.shape[2:]
    return crop(
        pixels.to(DEVICE),
        torch.from_numpy(pack(boxes, flip=flip, extent=(height, width))).to(DEVICE),
        down=torch.from_numpy(tap_table(height, size[0], resize)).to(DEVICE),
        across=torch.from_numpy(tap_table(width, size[1], resize)).to(DEVICE),
        narrow=bool((boxes[..., 3] < 4).any()),
        tile=tile,
    ).cpu()


def exact(
    pixels: torch.Tensor,
    boxes: Boxes,
    size: tuple[int, int],
    resize: Resize = "tf2",
    *,
    flip: npt.NDArray[np.bool_] | None = None,
) -> torch.Tensor:
    ready = pixels.double() / 255 if pixels.dtype == torch.uint8 else pixels.double()
    return crop_resize(ready, boxes, size, resize, flip=flip).unflatten(0, boxes.shape[:2])


def assert_same(
    pixels: torch.Tensor,
    boxes: Boxes,
    size: tuple[int, int],
    resize: Resize = "tf2",
    *,
    flip: npt.NDArray[np.bool_] | None = None,
    tile: Tile = TILE,
) -> None:
    found = fused(pixels, boxes, size, resize, flip=flip, tile=tile)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    expected = exact(pixels, boxes, size, resize, flip=flip)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 20, 30),
        (0, 0, 9, 11),
        (0, 19, 9, 11),
        (11, 0, 9, 11),
        (11, 19, 9, 11),
        (5, 6, 4, 4),
        (7, 0, 3, 30),
        (0, 8, 20, 3),
        (19, 29, 1, 1),
        (0, 0, 1, 1),
        (4, 0, 2, 2),
        (4, 28, 5, 2),
    ],
)
def test_boxes_at_every_border_and_of_one_pixel(box: Sequence[int], resize: Resize) -> None:
    assert_same(bytes_of(1, 20, 30), boxes_of(box), (6, 7), resize)


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize(
    ("extent", "size"),
    [
        ((12, 10), (23, 19)),  # larger, both ways
        ((64, 50), (9, 5)),  # smaller, by more than the four pixels that are read
        ((9, 9), (9, 9)),
        ((3, 90), (11, 10)),
        ((90, 3), (10, 11)),
        ((1, 1), (2, 3)),
        ((5, 4), (1, 1)),
    ],
)
def test_sizes(extent: tuple[int, int], size: tuple[int, int], resize: Resize) -> None:
    boxes = boxes_of((0, 0, *extent))
    assert_same(bytes_of(1, *extent), boxes, size, resize, tile=Tile(32, 32, 1))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (4, 8), (5, 9), (13, 17)])
@pytest.mark.parametrize("tile", [SMALL, Tile(16, 4, 1), Tile(1, 32, 1)])
def test_tiles_change_nothing(size: tuple[int, int], tile: Tile) -> None:
    pixels, boxes = bytes_of(2, 11, 12), random_boxes(1, 2, 11, 12)
    flip = np.array([[False, True]])
    found = fused(pixels, boxes, size, flip=flip, tile=tile)
    expected = fused(pixels, boxes, size, flip=flip)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found, exact(pixels, boxes, size, flip=flip), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_several_views_of_several_images(views: int, resize: Resize) -> None:
    boxes = random_boxes(views, 3, 14, 9)
    flip = np.arange(views * 3).reshape(views, 3) % 2 == 0
    assert_same(bytes_of(3, 14, 9), boxes, (6, 5), resize, flip=flip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_pixels(dtype: torch.dtype) -> None:
    pixels = (bytes_of(2, 10, 12) / 255).to(dtype)
    assert_same(pixels, random_boxes(2, 2, 10, 12), (5, 6))


def test_any_strides() -> None:
    pixels, boxes = bytes_of(4, 18, 20), random_boxes(1, 2, 9, 10)
    part = pixels[1::2, :, 3:12, 1::2]
    expected = fused(part.contiguous(), boxes, (4, 5))
    strided = [part]
    for order in ((0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)):
        back = [order.index(axis) for axis in range(4)]
        strided.append(part.permute(order).contiguous().permute(back))
    for found in strided:
        assert not found.is_contiguous()
        torch.testing.assert_close(fused(found, boxes, (4, 5)), expected, rtol=0, atol=ROUNDING)
    same = part[:1].expand(2, -1, -1, -1)
    again = fused(same.contiguous(), boxes, (4, 5))
    torch.testing.assert_close(fused(same, boxes, (4, 5)), again, rtol=0, atol=ROUNDING)


def test_the_same_twice_and_the_pixels_stay() -> None:
    pixels, boxes = bytes_of(3, 12, 9), random_boxes(2, 3, 12, 9)
    before = pixels.clone()
    found = fused(pixels, boxes, (7, 6))
    assert torch.equal(fused(pixels, boxes, (7, 6)), found)
    assert torch.equal(pixels, before)


def test_a_crop_does_not_depend_on_its_batch() -> None:
    pixels, boxes = bytes_of(4, 12, 14), random_boxes(2, 4, 12, 14)
    whole = fused(pixels, boxes, (4, 5))
    part = fused(pixels[1:3], boxes[:, 1:3], (4, 5))
    torch.testing.assert_close(part, whole[:, 1:3], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("box", [(4, 3, 6, 7), (4, 3, 1, 1), (4, 3, 2, 7), (4, 3, 6, 3)])
@pytest.mark.parametrize("resize", ["tf2", "tf1"])
def test_no_pixel_outside_a_crop_is_read(box: tuple[int, int, int, int], resize: Resize) -> None:
    y, x, height, width = box
    inside = (..., slice(y, y + height), slice(x, x + width))
    clean = bytes_of(1, 16, 15) / 255
    pixels = torch.full_like(clean, torch.nan)
    pixels[inside] = clean[inside]
    found = fused(pixels, boxes_of(box), (9, 8), resize)
    assert found.isfinite().all()
    assert torch.equal(found, fused(clean, boxes_of(box), (9, 8), resize))


def test_nan_in_a_crop_stays_near() -> None:
    pixels = torch.zeros(1, 3, 12, 12)
    pixels[0, 1, 6, 5] = torch.nan
    found = fused(pixels, boxes_of((0, 0, 12, 12)), (12, 12))[0, 0]
    assert found[1, 6, 5].isnan()
    assert found[[0, 2]].isfinite().all()
    assert found[1, :3].isfinite().all()
    assert found[1, :, 9:].isfinite().all()


def test_overshoot_is_kept() -> None:
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    pixels[..., 2:] = 255
    found = fused(pixels, boxes_of((0, 0, 4, 4)), (8, 8))
    assert found.min() < 0
    assert found.max() > 1


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_the_table_has_the_values_of_taps(size: int, resize: Resize) -> None:
    table = tap_table(40, size, resize)
    first, weight = taps(np.arange(1, 41), size, resize)
    assert table.flags.c_contiguous
    for row, length in enumerate(range(1, 41)):
        dense, expected = np.zeros((size, 46), np.float32), np.zeros((size, 46), np.float32)
        for i in range(size):
            begin = int(table[row, 0, i])
            assert begin == table[row, 0, i]
            assert 0 <= begin <= max(length - 4, 0)
            dense[i, begin + 2 : begin + 6] = table[row, 1:, i]
            expected[i, first[row, i] + 2 : first[row, i] + 6] = weight[row, i]
        assert (dense == expected).all()
        assert (dense[:, length + 2 :] == 0).all()


def test_from_the_front_it_is_the_plain_crop() -> None:
    pixels, boxes = bytes_of(2, 12, 9).to(DEVICE), random_boxes(2, 2, 12, 9)
    flip = np.array([[True, False], [False, True]])
    found = crop_resize(pixels, boxes, (7, 6), "tf1", flip=flip, fused=True)
    plain = crop_resize(pixels, boxes, (7, 6), "tf1", flip=flip)
    assert found.shape == plain.shape == (4, 3, 7, 6)
    torch.testing.assert_close(found, plain, rtol=0, atol=TOLERANCE)
    # The batch is as any other one could be, without a copy.
    assert found.is_contiguous()
    double = pixels.cpu().double() / 255
    expected = crop_resize(double, boxes, (7, 6), "tf1", flip=flip)
    assert torch.equal(crop_resize(double, boxes, (7, 6), "tf1", flip=flip, fused=True), expected)


@pytest.mark.parametrize("resident", [False, True])
def test_evaluation_crops(resident: bool) -> None:
    settings = ViewSettings(image_size=9)
    pixels = bytes_of(2, 14, 17)
    if resident:  # pixels on the device are [B,h,w,3] in memory
        pixels = pixels.contiguous(memory_format=torch.channels_last).to(DEVICE)
    draws = centre_draws(settings, np.tile(np.array([14, 17], np.int32), (2, 1)))
    found = make_views(pixels, draws, settings, device=DEVICE, fused=True)
    expected = make_views(pixels.cpu().double() / 255, draws, settings, device=CPU)
    np.testing.assert_allclose(found.cpu(), expected, rtol=0, atol=TOLERANCE)


def test_nothing_to_crop() -> None:
    assert fused(bytes_of(0, 8, 8), np.zeros((2, 0, 4), np.int32), (4, 5)).shape == (2, 0, 3, 4, 5)
    assert fused(bytes_of(2, 8, 8), np.zeros((0, 2, 4), np.int32), (4, 5)).shape == (0, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "box", [(-1, 0, 3, 3), (0, -1, 3, 3), (0, 0, 0, 3), (0, 0, 3, 0), (6, 0, 3, 3), (0, 8, 3, 3)]
)
def test_a_box_that_leaves_its_image_is_refused(box: Sequence[int]) -> None:
    boxes = boxes_of((0, 0, 8, 10), box)
    with pytest.raises(ValueError, match="leaves its image of 8 x 10"):
        fused(bytes_of(2, 8, 10), boxes, (4, 4))


@pytest.mark.parametrize(
    ("pixels", "places", "down", "complaint"),
    [
        ((2, 1, 8, 9), (1, 2, 5), (8, 5, 4), "pixels must be"),
        ((3, 8, 9), (1, 2, 5), (8, 5, 4), "pixels must be"),
        ((2, 3, 8, 9), (1, 3, 5), (8, 5, 4), "places must be"),
        ((2, 3, 8, 9), (1, 2, 4), (8, 5, 4), "places must be"),
        ((2, 3, 8, 9), (1, 2, 5), (9, 5, 4), "down must be"),
        ((2, 3, 8, 9), (1, 2, 5), (8, 5), "down must be"),
    ],
)
def test_other_shapes_are_refused(
    pixels: tuple[int, ...], places: tuple[int, ...], down: tuple[int, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        crop(
            torch.zeros(pixels),
            torch.zeros(places, dtype=torch.int32),
            down=torch.zeros(down),
            across=torch.zeros(9, 5, 4),
            narrow=False,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("extent", "last"), [((224, 224), False), ((500, 375), True)])
def test_views_of_224_pixels(extent: tuple[int, int], last: bool) -> None:
    settings = ViewSettings(image_size=224)
    draws = draw_views(
        settings,
        seed=1,
        epochs=np.zeros(1, np.int64),
        indices=np.arange(1),
        sizes=np.array([extent], np.int32),
    )
    layout = torch.channels_last if last else torch.contiguous_format
    pixels = bytes_of(1, *extent).contiguous(memory_format=layout)
    # The interpreter is slow with many programs.
    tile = TILE if torch.cuda.is_available() else Tile(rows=256, columns=256, warps=8)
    assert_same(pixels, draws.boxes, (224, 224), flip=draws.flip, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("extent", [(32, 32), (224, 224), (500, 375)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("tile", [TILE, Tile(64, 64, 2), Tile(16, 256, 4)])
def test_large_batches(extent: tuple[int, int], last: bool, tile: Tile) -> None:
    boxes = random_boxes(2, 16, *extent)
    layout = torch.channels_last if last else torch.contiguous_format
    pixels = bytes_of(16, *extent).contiguous(memory_format=layout)
    assert_same(pixels, boxes, (224, 224), tile=tile)


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    pixels = bytes_of(4, 50, 60).cuda()
    down = torch.from_numpy(tap_table(50, 32, "tf2")).cuda()
    across = torch.from_numpy(tap_table(60, 32, "tf2")).cuda()
    boxes = random_boxes(2, 4, 50, 60)
    places = torch.ones(2, 4, 5, dtype=torch.int32, device="cuda")
    crop(pixels, places, down=down, across=across, narrow=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = crop(pixels, places, down=down, across=across, narrow=True)
    places.copy_(torch.from_numpy(pack(boxes, flip=None, extent=(50, 60))))
    graph.replay()
    expected = exact(pixels.cpu(), boxes, (32, 32))
    np.testing.assert_allclose(found.cpu(), expected, rtol=0, atol=TOLERANCE)
