"""Augmentation against stored values and samples of the official code."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.colour import brightness_, contrast_, grey, hue_, jitter_, saturation_
from bigsimclr.augment.device import blur, crop_resize, make_views
from bigsimclr.augment.draws import Draws, centre_boxes, draw_views
from bigsimclr.augment.host import crop_resize_one
from tests.golden.paths import golden_dir

pytestmark = pytest.mark.golden

FOLDER = golden_dir() / "augment"
if not (FOLDER / "deterministic.npz").is_file():
    pytest.skip(f"no golden values in {FOLDER}", allow_module_level=True)
CASES = json.loads((FOLDER / "deterministic.json").read_text())
STORED = dict(np.load(FOLDER / "deterministic.npz"))
SAMPLED = dict(np.load(FOLDER / "random.npz"))
NOTES = json.loads((FOLDER / "random.json").read_text())["stats"]

OPERATIONS = {
    "brightness": brightness_,
    "contrast": contrast_,
    "saturation": saturation_,
    "hue": hue_,
}
NAMES = list(OPERATIONS)
COLOUR_TOLERANCE = {"brightness": 2e-6, "contrast": 2e-6, "saturation": 1e-5, "hue": 1e-5}
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernels


def channels_first(image, dtype=torch.float32, device=CPU):
    """[H,W,3] -> [1,3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device, dtype).contiguous()


def stored_image(name):
    return STORED[name] if name in STORED else STORED[f"{name}_uint8"]


def difference(found, expected):
    """Largest absolute difference of [1,3,H,W] or [3,H,W] from [H,W,3]."""
    if isinstance(found, torch.Tensor):
        found = found.cpu().numpy()
    found = found.reshape(-1, *found.shape[-2:]).transpose(1, 2, 0)
    assert found.shape == expected.shape
    return np.abs(found.astype(np.float64) - expected).max()


def cropped(image, box, size, resize, device):
    """Crop by the host's and by the device's path, which must agree."""
    host = torch.empty(3, *size)
    crop_resize_one(image, box, resize, out=host)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
    found = crop_resize(pixels, box[None, None], size, resize)[0]
    return host.numpy(), found.cpu().numpy()


def kernels(prefix):
    return [
        (name, key)
        for name in CASES
        if re.fullmatch(prefix + r"\d+", name)
        for key in ("tf1", "tf2")
        if f"{name}/{key}" in STORED
    ]


@pytest.mark.parametrize(("name", "resize"), kernels("crop"))
def test_crop_and_resize(name, resize, device):
    case = CASES[name]
    box = np.array([case["y"], case["x"], case["h"], case["w"]], np.int32)
    size = (case["out_h"], case["out_w"])
    for found in cropped(stored_image(case["image"]), box, size, resize, device):
        assert difference(found, STORED[f"{name}/{resize}"]) < 1e-6


@pytest.mark.parametrize(("name", "resize"), kernels("eval"))
def test_evaluation_crop(name, resize, device):
    case = CASES[name]
    image = stored_image(case["image"])
    size = (case["height"], case["width"])
    box = np.array([0, 0, *image.shape[:2]], np.int32)
    if case["test_crop"]:
        sizes = np.array([image.shape[:2]], np.int32)
        box = centre_boxes(sizes, 0.875, aspect=size[1] / size[0])[0]
        assert box.tolist() == [case[key] for key in ("off_y", "off_x", "crop_h", "crop_w")]
    for found in cropped(image, box, size, resize, device):
        assert difference(found.clip(0, 1), STORED[f"{name}/{resize}"]) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if re.fullmatch(r"blur\d+", name)])
def test_blur(name, device):
    case = CASES[name]
    image = stored_image(case["image"])
    pixels = channels_first(
        image if image.dtype != np.uint8 else np.float32(image) / 255, device=device
    )
    radius = case["kernel_size_arg"] // 2
    found = blur(pixels, torch.tensor([case["sigma"]], device=device), radius=radius)
    assert difference(found, STORED[name]) < 2e-6
    # An impulse shows the kernel itself.
    side = 2 * radius + 1
    impulse = torch.zeros(1, 3, side, side, dtype=torch.float64, device=device)
    impulse[..., radius, radius] = 1
    sigma = torch.tensor([case["sigma"]], dtype=torch.float64, device=device)
    row = blur(impulse, sigma, radius=radius)[0, 0]
    expected = STORED[f"{name}_kernel64"]
    np.testing.assert_allclose(row.cpu().numpy(), np.outer(expected, expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in CASES if re.match(r"color/[a-z]+\d+/", n)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_colour_operation(name, dtype, device):
    case = CASES[name]
    operation = re.match(r"color/([a-z]+)", name)[1]
    pixels = channels_first(stored_image(case["image"]), dtype, device)
    factor = torch.tensor([case["factor"]], dtype=dtype, device=device)
    found = OPERATIONS[operation](pixels, factor)
    assert difference(found, STORED[name]) < COLOUR_TOLERANCE[operation]


@pytest.mark.parametrize("name", [n for n in STORED if n.startswith("color/grayscale/")])
def test_grey(name, device):
    image = stored_image(name.rsplit("/", 1)[1])
    pixels = channels_first(
        image if image.dtype != np.uint8 else np.float32(image) / 255, device=device
    )
    expected = STORED[name]
    found = grey(pixels).expand(-1, expected.shape[-1], -1, -1)
    assert difference(found, expected) < 2e-6


@pytest.mark.parametrize("name", [n for n in STORED if n.startswith("color_degenerate/")])
def test_degenerate_colours(name, device):
    operation = name.rsplit("/", 1)[1]
    factors = [CASES[n]["factor"] for n in CASES if re.match(rf"color/{operation}\d+/", n)]
    colours = STORED["degenerate"]
    for factor, expected in zip(factors, STORED[name], strict=True):
        pixels = channels_first(colours, device=device)
        found = OPERATIONS[operation](pixels, torch.tensor([factor], device=device))
        off = np.abs(found[0].permute(1, 2, 0).cpu().numpy() - expected).max(axis=-1)
        if operation == "hue":
            off = off[np.ptp(colours, axis=-1) > 0]
        assert off.max() < COLOUR_TOLERANCE[operation]


@pytest.mark.parametrize("name", [name for name in CASES if re.fullmatch(r"jitter\d+", name)])
def test_jitter_sequence(name, device):
    case = CASES[name]
    pixels = channels_first(stored_image(case["image"]), device=device)
    order = np.array([[NAMES.index(operation) for operation, _ in case["sequence"]]], np.uint8)
    factors = np.zeros((1, 4), np.float32)
    for operation, factor in case["sequence"]:
        factors[0, NAMES.index(operation)] = factor
    found = jitter_(pixels, np.array([0]), order=order, factors=factors)
    assert difference(found, STORED[name]) < 2e-5


# --- the same in fused kernels -----------------------------------------------------------------


def fused(image, *, radius=0, **changes):
    """Distort one image [H,W,3] by the kernels; what is not named stays off."""
    off = np.zeros((1, 1), np.bool_)
    draws = Draws(
        boxes=np.zeros((1, 1, 4), np.int32),
        flip=off,
        jitter=changes.get("jitter", off),
        order=changes.get("order", np.arange(4, dtype=np.uint8)[None, None]),
        factors=changes.get("factors", np.ones((1, 1, 4), np.float32)),
        grey=changes.get("grey", off),
        blur=changes.get("blur", off),
        sigma=changes.get("sigma", np.ones((1, 1), np.float32)),
    )
    pixels = channels_first(image if image.dtype != np.uint8 else np.float32(image) / 255)[None]
    settings = ViewSettings(image_size=20 * radius)  # of which only the radius is taken
    return make_views(pixels, draws, settings, device=DEVICE, fused=True).cpu()


ON = np.ones((1, 1), np.bool_)


@pytest.mark.parametrize("name", [name for name in CASES if re.fullmatch(r"jitter\d+", name)])
def test_fused_jitter_sequence(name):
    case = CASES[name]
    order = np.array([[[NAMES.index(operation) for operation, _ in case["sequence"]]]], np.uint8)
    factors = np.zeros((1, 1, 4), np.float32)
    for operation, factor in case["sequence"]:
        factors[..., NAMES.index(operation)] = factor
    found = fused(stored_image(case["image"]), jitter=ON, order=order, factors=factors)
    assert difference(found, STORED[name]) < 2e-5


@pytest.mark.parametrize("name", [n for n in STORED if n.startswith("color/grayscale/")])
def test_fused_grey(name):
    expected = STORED[name]
    found = fused(stored_image(name.rsplit("/", 1)[1]), grey=ON)[:, : expected.shape[-1]]
    assert difference(found, expected) < 2e-6


@pytest.mark.parametrize("name", [name for name in CASES if re.fullmatch(r"blur\d+", name)])
def test_fused_blur(name):
    case = CASES[name]
    sigma = np.full((1, 1), case["sigma"], np.float32)
    radius = case["kernel_size_arg"] // 2
    found = fused(stored_image(case["image"]), radius=radius, blur=ON, sigma=sigma)
    assert difference(found, STORED[name]) < 2e-6


# --- random draws ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SAMPLED if name.startswith("boxes_")])
def test_boxes_have_the_official_distribution(name):
    height, width, out_height, out_width = (int(side) for side in re.findall(r"\d+", name))
    stored = SAMPLED[name].astype(np.float64)
    count = len(stored)
    shape = out_width / out_height
    settings = ViewSettings(image_size=out_height, crop_aspect=(3 / 4 * shape, 4 / 3 * shape))
    draws = draw_views(
        settings,
        seed=0,
        epochs=np.zeros(count, np.int64),
        indices=np.arange(count),
        sizes=np.tile(np.array([height, width], np.int32), (count, 1)),
        views=1,
    )
    for found, expected in zip(
        box_features(draws.boxes[0].astype(np.float64), height, width),
        box_features(stored, height, width),
        strict=True,
    ):
        assert ks_2samp(found, expected, method="asymp").statistic < 0.02


def box_features(boxes, height, width):
    y, x, box_height, box_width = boxes.T
    return (
        box_height * box_width / (height * width),
        np.log(box_width / box_height),
        (y + box_height / 2) / height,
        (x + box_width / 2) / width,
        y / np.maximum(height - box_height, 1),
        x / np.maximum(width - box_width, 1),
    )


def view_features(views):
    """Summarise [N,3,H,W] by the eleven stored columns."""
    spread = views.amax(1) - views.amin(1)
    half = views.shape[3] // 2
    columns = [
        *views.mean((2, 3)).T,
        *views.std((2, 3), correction=0).T,
        (spread.amax((1, 2)) < 1e-6).float(),
        spread.mean((1, 2)),
        views[..., :half].mean((1, 2, 3)) - views[..., half:].mean((1, 2, 3)),
        views.amin((1, 2, 3)),
        views.amax((1, 2, 3)),
    ]
    return torch.stack(columns, dim=1).numpy()


def sample_views(image, settings, count, *, crop, piece=250):
    """Make `count` views of one image [H,W,3], in pieces."""
    features = []
    for start in range(0, count, piece):
        images = min(piece, count - start)
        draws = draw_views(
            settings,
            seed=1,
            epochs=np.zeros(images, np.int64),
            indices=np.arange(start, start + images),
            sizes=np.tile(np.array(image.shape[:2], np.int32), (images, 1)),
            views=1,
        )
        pixels = channels_first(image).expand(images, -1, -1, -1)
        views = make_views(pixels if crop else pixels[None], draws, settings, device=CPU)
        features.append(view_features(views))
    return np.concatenate(features)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in SAMPLED if re.fullmatch(r"(train|jitter_only)_s[\d.]+", n)]
)
def test_views_have_the_official_distribution(name):
    strength = float(name.rsplit("_s", 1)[1])
    crop = name.startswith("train")
    out = re.search(r"tiny_photo,\s*(\d+)", NOTES.get(name, {}).get("note", ""))
    settings = ViewSettings(
        image_size=int(out[1]) if out else 32,
        flip_probability=0.5 if crop else 0.0,
        colour_strength=strength,
        # The official code makes nothing grey either when the strength is 0.
        colour_probability=0.8 if strength else 0.0,
        grey_probability=0.2 if strength else 0.0,
    )
    stored = SAMPLED[name].astype(np.float64)
    found = sample_views(SAMPLED["tiny_photo"], settings, len(stored), crop=crop)
    # Samples are stored in float16; equal rounding keeps ties equal.
    found = found.astype(np.float16).astype(np.float64)
    for column in range(stored.shape[1]):
        test = ks_2samp(found[:, column], stored[:, column], method="asymp")
        assert test.statistic < 0.045, column


def test_blur_changes_images_as_much_as_the_official_one():
    image = SAMPLED["blur_input"]
    official = SAMPLED["blur_mean_abs_change_per_batch"].astype(np.float64)
    count = 2000
    settings = ViewSettings(image_size=image.shape[0], flip_probability=0.0, blur_probability=0.5)
    draws = draw_views(
        settings,
        seed=2,
        epochs=np.zeros(count, np.int64),
        indices=np.arange(count),
        sizes=np.tile(np.array(image.shape[:2], np.int32), (count, 1)),
        views=1,
    )
    pixels = channels_first(image)
    views = make_views(pixels.expand(1, count, -1, -1, -1), draws, settings, device=CPU)
    # The stored change is the mean over a batch's blurred images, which share one sigma with the
    # blurred images of the other view; half the entries are independent.
    change = (views - pixels).abs().mean((1, 2, 3)).double().numpy()
    assert (change[~draws.blur[0]] == 0).all()
    blurred = change[draws.blur[0]]
    error = np.hypot(
        official.std() / (len(official) / 2) ** 0.5, blurred.std() / len(blurred) ** 0.5
    )
    assert abs(blurred.mean() - official.mean()) < 3 * error
