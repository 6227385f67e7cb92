"""The random decisions of every view, drawn on the host for a whole batch at once.

A decision is a pure function of (seed, epoch, image index, view, slot), so rank, worker and restart
do not matter, and a new decision takes a new slot and moves no other one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from bigsimclr.augment import ViewSettings
from bigsimclr.randomness import Stream, Words, below, philox, uniform

# Slots, the last counter word. Frozen: another number would change every published run.
_FLIP, _JITTER, _ORDER, _FACTORS, _GREY, _BLUR, _SIGMA = range(7)
_FIRST_CROP: Final = 64
_CROP_ATTEMPTS: Final = 100

_SIGMA_RANGE: Final = (0.1, 2.0)
# The official crop proposes boxes of at least 0.08 of the area and rejects those below 0.10; the
# same ratio keeps the same law of aspects at any lower bound.
_PROPOSED_TO_LEAST: Final = 0.8

_PERMUTATIONS: Final = np.array(
    [
        [a, b, c, 6 - a - b - c]
        for a in range(4)
        for b in range(4)
        for c in range(4)
        if len({a, b, c}) == 3
    ],
    dtype=np.uint8,
)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Draws:
    """What happens to every view of a batch: V views of B images.

    Attributes:
        boxes: int32 [V,B,4], crop as (y, x, height, width) in pixels of the image.
        flip: bool [V,B], mirrored left to right.
        jitter: bool [V,B], colours jittered.
        order: uint8 [V,B,4], jitter operations in order: 0 brightness, 1 contrast, 2 saturation,
            3 hue.
        factors: float32 [V,B,4], by operation: three multipliers, and the hue shift in turns.
        grey: bool [V,B], turned grey.
        blur: bool [V,B], blurred.
        sigma: float32 [V,B], standard deviation of the blur in pixels.
    """

    boxes: npt.NDArray[np.int32]
    flip: npt.NDArray[np.bool_]
    jitter: npt.NDArray[np.bool_]
    order: npt.NDArray[np.uint8]
    factors: npt.NDArray[np.float32]
    grey: npt.NDArray[np.bool_]
    blur: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]

    @property
    def views(self) -> int:
        """Number of views V."""
        return int(self.flip.shape[0])

    @property
    def images(self) -> int:
        """Number of images B."""
        return int(self.flip.shape[1])

    def take(self, rows: slice) -> "Draws":
        """Return the draws of a slice of the images, all views."""
        return Draws(*(getattr(self, field.name)[:, rows] for field in fields(self)))

    @staticmethod
    def stack(pieces: Sequence["Draws"]) -> "Draws":
        """Join the draws of consecutive images; all pieces have the same number of views."""
        return Draws(
            *(
                np.concatenate([getattr(piece, field.name) for piece in pieces], axis=1)
                for field in fields(Draws)
            )
        )


def draw_views(
    settings: ViewSettings,
    *,
    seed: int,
    epochs: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    views: int = 2,
) -> Draws:
    """Draw every random decision of a batch.

    Source: google-research/simclr data_util.py, random_crop_with_resize, random_color_jitter and
    random_blur; here each image has its own blur sigma.

    Args:
        settings: How views are made.
        seed: The run's seed.
        epochs: int64 [B], epoch of each image, below 2^32.
        indices: int64 [B], index of each image in its source, below 2^32.
        sizes: int32 [B,2], height and width of each image in pixels.
        views: Number of views V.

    Returns:
        The draws.
    """
    counters = np.zeros((views, len(indices), 4), np.uint32)
    counters[..., 0] = epochs.astype(np.uint32)
    counters[..., 1] = indices.astype(np.uint32)
    counters[..., 2] = np.arange(views, dtype=np.uint32)[:, None]
    slots = np.repeat(counters[None], 7, axis=0)
    slots[..., 3] = np.arange(7, dtype=np.uint32)[:, None, None]
    bits = philox(seed, Stream.VIEWS, slots)
    chance = uniform(bits[..., 0])
    orders = below(bits[_ORDER, ..., 0], len(_PERMUTATIONS))
    low, high = _SIGMA_RANGE
    # A jitter of no strength changes nothing, and costs as much as any other.
    jitter_probability = settings.colour_probability if settings.colour_strength > 0 else 0.0
    return Draws(
        boxes=_crop_boxes(settings, seed, counters, sizes),
        flip=chance[_FLIP] < settings.flip_probability,
        jitter=chance[_JITTER] < jitter_probability,
        order=_PERMUTATIONS[orders],
        factors=_factors(uniform(bits[_FACTORS]), settings.colour_strength),
        grey=chance[_GREY] < settings.grey_probability,
        blur=chance[_BLUR] < settings.blur_probability,
        sigma=np.float32(low) + np.float32(high - low) * chance[_SIGMA],
    )


def centre_draws(settings: ViewSettings, sizes: npt.NDArray[np.int32]) -> Draws:
    """Take the centre crop for evaluation: one view, nothing random.

    A square image for a view of at most 32 pixels is used whole, as the official code does on
    CIFAR-10.

    Source: google-research/simclr data_util.py, center_crop and preprocess_for_eval.

    Args:
        settings: How views are made.
        sizes: int32 [B,2], height and width of each image in pixels.

    Returns:
        The draws, V = 1.
    """
    boxes = centre_boxes(sizes, settings.eval_crop_proportion)
    if settings.image_size <= 32:
        whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        boxes = np.where((sizes[:, :1] == sizes[:, 1:]), whole, boxes)
    none = np.zeros((1, len(sizes)), np.bool_)
    return Draws(
        boxes=boxes[None].astype(np.int32),
        flip=none,
        jitter=none,
        order=np.tile(np.arange(4, dtype=np.uint8), (1, len(sizes), 1)),
        factors=np.tile(np.array([1, 1, 1, 0], np.float32), (1, len(sizes), 1)),
        grey=none,
        blur=none,
        sigma=np.full((1, len(sizes)), _SIGMA_RANGE[0], np.float32),
    )


def centre_boxes(
    sizes: npt.NDArray[np.int32], proportion: float, aspect: float = 1.0
) -> npt.NDArray[np.int32]:
    """Place the largest centred box of a given aspect, shrunk by a proportion.

    Args:
        sizes: int32 [B,2], height and width of each image in pixels.
        proportion: Share of the limiting side that is kept.
        aspect: Width / height of the box.

    Returns:
        int32 [B,4], (y, x, height, width).
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    limited_by_width = aspect > width / height
    box_height = np.where(limited_by_width, proportion / aspect * width, proportion * height)
    box_width = np.where(limited_by_width, proportion * width, proportion * aspect * height)
    box = np.maximum(np.rint(np.stack([box_height, box_width], axis=1)), 1).astype(np.int32)
    return np.concatenate([(sizes - box + 1) // 2, box], axis=1).astype(np.int32)


def _factors(chance: Floats, strength: float) -> Floats:
    # chance: float32 [V,B,4] -> the factor of each operation.
    spread = 0.8 * strength
    low, high = max(1 - spread, 0.0), 1 + spread
    factors = np.float32(low) + np.float32(high - low) * chance
    shift = min(0.2 * strength, 0.5)
    factors[..., 3] = np.float32(shift) * (2 * chance[..., 3] - 1)
    return factors


def _crop_boxes(
    settings: ViewSettings, seed: int, counters: Words, sizes: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    # counters: uint32 [V,B,4] -> int32 [V,B,4]. Only boxes still wanted are drawn again.
    views, images = counters.shape[:2]
    flat = counters.reshape(-1, 4).copy()
    limits = np.tile(sizes.astype(np.int64), (views, 1))
    boxes = np.concatenate([np.zeros_like(limits), limits], axis=1)
    wanted = np.arange(views * images)
    for attempt in range(_CROP_ATTEMPTS):
        if not wanted.size:
            break
        asked = flat[wanted]
        asked[:, 3] = _FIRST_CROP + attempt
        proposed, valid = _propose(settings, philox(seed, Stream.VIEWS, asked), limits[wanted])
        boxes[wanted[valid]] = proposed[valid]
        wanted = wanted[~valid]
    return boxes.astype(np.int32).reshape(views, images, 4)


def _propose(
    settings: ViewSettings, bits: Words, sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Draw one box per image, and say which ones obey the limits.

    Source: TensorFlow sample_distorted_bounding_box_op.cc, including its float32 rounding: the
    aspect is uniform, then the height is a uniform integer between the bounds that the area and
    the image allow, then the position is uniform and never the last one.

    Args:
        settings: Area and aspect limits.
        bits: uint32 [N,4], for aspect, height, y and x.
        sizes: int64 [N,2], height and width of the images in pixels.

    Returns:
        int64 [N,4] boxes and bool [N].
    """
    image_height, image_width = sizes[:, 0], sizes[:, 1]
    pixels = (image_height * image_width).astype(np.float32)
    narrow, wide = (np.float32(limit) for limit in settings.crop_aspect)
    aspect = uniform(bits[:, 0]) * (wide - narrow) + narrow
    least = np.float32(settings.crop_area[0] * _PROPOSED_TO_LEAST) * pixels
    most = np.float32(settings.crop_area[1]) * pixels

    def width_of(height: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.rint(height.astype(np.float32) * aspect).astype(np.int64)

    tallest = np.rint(np.sqrt(most / aspect)).astype(np.int64)
    fitting = ((image_width + 0.5 - 1e-7) / aspect.astype(np.float64)).astype(np.int64)
    fitting -= width_of(fitting) > image_width
    tallest = np.where(width_of(tallest) > image_width, fitting, tallest)
    tallest = np.minimum(tallest, image_height)
    shortest = np.minimum(np.rint(np.sqrt(least / aspect)).astype(np.int64), tallest)
    height = shortest + below(bits[:, 1], tallest - shortest + 1)
    # Rounding may leave the area just outside its limits: one pixel of height mends it.
    height = height + (width_of(height) * height < least)
    height = height - (width_of(height) * height > most)
    width = width_of(height)
    area = (width * height).astype(np.float32)
    valid = (
        (area >= least)
        & (area <= most)
        & (area / pixels >= np.float32(settings.crop_area[0]))
        & (width <= image_width)
        & (height <= image_height)
        & (width > 0)
        & (height > 0)
    )
    y = below(bits[:, 2], np.maximum(image_height - height, 1))
    x = below(bits[:, 3], np.maximum(image_width - width, 1))
    return np.stack([y, x, height, width], axis=1), valid
