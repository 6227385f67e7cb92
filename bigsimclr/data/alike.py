"""Images that look alike: a hash of what an image shows, and all pairs of hashes close by.

Images of different sizes, qualities or formats hash alike where they show the same. The hash
says which of 64 low frequencies of the grey image are above their median. Simple images share
these without being copies, so a small picture is kept of each for a second look at every pair.

Source of the hash: Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

BITS: Final = 64

_SIDE: Final = 32  # pixels of the thumbnail whose frequencies are taken
_BAND: Final = 1 << 22  # pixels that are turned grey at a time, which bounds the memory
_ONES: Final = np.array([number.bit_count() for number in range(256)], np.uint8)
_LUMA: Final = (0.299, 0.587, 0.114)
_SMALLEST: Final = 32  # pixels; two handwritten threes of 28x28 are as close as copies of one
_PICTURE: Final = 16  # pixels of a side of the small picture
_STEPS: Final = 24  # grey steps of the small picture in one standard deviation
# Two pictures may differ by this share of their own detail. Of a thousand photographs and their
# copies compressed again or halved the highest is 0.07, cut by 2% 0.38; of 1,797 handwritten
# digits, which stand on flat ground, the lowest of all that hash alike is 0.19.
_NEAR: Final = 0.4
_NEAR_ON_FLAT_GROUND: Final = 0.15
_GROUND: Final = 64  # pixels of 256 of about one grey make a flat ground
_ONE_GREY: Final = 4  # steps
_COMPARED: Final = 4096  # pairs of pictures at a time, which bounds the memory
# Below this deviation (of 255) a thumbnail shows nothing: its frequencies are rounding errors.
_PLAIN: Final = 2.0
_NOBODY: Final = np.iinfo(np.int64).max
_DISTANCE_SHIFT: Final = 40  # (distance, image) in one number; images below 2^40

Floats = NDArray[np.float32]
Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Look:
    """What is kept of how an image looks."""

    hash: int  # 64 bits
    picture: bytes  # 16 x 16 greys, row by row, of one mean and one deviation for all images


def look_of(
    pixels: NDArray[np.uint8],  # [h, w, 3]
) -> Look | None:
    """Note how an image looks; None where it is too plain or too small to tell by."""
    if min(pixels.shape[:2]) < _SMALLEST:
        return None
    thumbnail = _thumbnail(pixels)
    if float(thumbnail.std()) < _PLAIN:
        return None
    waves, rows, columns = _frequencies()
    low = (waves @ thumbnail @ waves.T)[rows, columns]
    bits = np.packbits(low > np.median(low))
    halves = thumbnail.reshape(_PICTURE, 2, _PICTURE, 2).mean(axis=(1, 3))
    greys = 128 + _STEPS * (halves - halves.mean()) / thumbnail.std()
    picture = np.clip(np.rint(greys), 0, 255).astype(np.uint8)
    return Look(int.from_bytes(bits.tobytes(), "big"), picture.tobytes())


def resemble(
    one: Pictures,  # [n, 256]
    other: Pictures,  # [n, 256], or [1, 256]: each is compared with it
) -> NDArray[np.bool_]:  # [n]
    """Say of pairs of small pictures whether they show the same, but for what copying changes.

    The difference is measured in what the two differ by from pixel to pixel, of which a copy that
    is cut or shifted a little differs in a small share. On flat ground, where the hash tells
    little, it must be smaller still.
    """
    found = np.zeros(len(one), np.bool_)
    for start in range(0, len(one), _COMPARED):
        left = one[start : start + _COMPARED].astype(np.float32)
        rest = other[start : start + _COMPARED] if len(other) == len(one) else other
        right = rest.astype(np.float32)
        detail = np.minimum(_detail(left), _detail(right))
        on_ground = _has_flat_ground(left) | _has_flat_ground(right)
        most = np.where(on_ground, _NEAR_ON_FLAT_GROUND, _NEAR) * detail
        apart = np.sqrt(np.square(left - right).mean(axis=1))
        found[start : start + _COMPARED] = apart <= most
    return found


def close_pairs(
    hashes: Hashes,  # [N]
    most: int,  # bits in which two may differ
) -> Iterator[tuple[Integers, Integers, Integers]]:
    """Yield all pairs of hashes that differ in `most` bits or fewer, some of them repeatedly.

    The bits are cut into `most` + 2 blocks. Whoever differs in `most` bits agrees in two blocks
    at least, so that sorting by every two blocks brings each such pair together: all are found,
    and few others are compared.

    Yields:
        int64 [n] three times: the pair, as places in `hashes`, and the bits in which it differs.
    """
    edges = np.linspace(0, BITS, most + 3).astype(int)
    masks = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in pairwise(edges)]
    for one, other in combinations(masks, 2):
        part = hashes & np.uint64(one | other)
        order = np.argsort(part, kind="stable")
        part, whole = part[order], hashes[order]
        first = np.arange(len(hashes), dtype=np.int64)
        for step in range(1, len(hashes)):
            # Sorted: a hash whose neighbour at this step is in another bucket has no farther one.
            first = first[: np.searchsorted(first, len(hashes) - step)]
            first = first[part[first] == part[first + step]]
            if not len(first):
                break
            apart = _bits_set(whole[first] ^ whole[first + step])
            close = apart <= most
            if close.any():
                yield order[first[close]], order[first[close] + step], apart[close]


@dataclass(frozen=True)
class Twins:
    """For every image, the one before it in the training images that it resembles most."""

    twin: Integers  # [N] an image among the first `train`, -1 where none is alike
    distance: Integers  # [N] bits in which the two differ; meaningless where there is none


def find_twins(
    hashes: Hashes,  # [N]
    has_hash: NDArray[np.bool_],  # [N]; images without one resemble nothing
    pictures: Pictures,  # [N, 256]
    *,
    train: int,  # the first `train` images are for training, the others held out
    most: int,
) -> Twins:
    """Find which training image every image resembles most; a training image, an earlier one.

    Those of one hash whose pictures resemble that of the first of them stand together: they are
    compared with others by its picture. Of several equally alike the first is taken.
    """
    shown = np.flatnonzero(has_hash)
    place, heads = _together(hashes[shown], pictures, shown)
    values, seen = hashes[heads], pictures[heads]
    first = np.full(len(values), _NOBODY, np.int64)  # first training image of each group
    np.minimum.at(first, place[shown < train], shown[shown < train])
    # A held-out image resembles whichever training image is closest; a training image, those
    # before it. The first image of a group stands for the training images in it.
    any_best = np.where(first < _NOBODY, first, _NOBODY)
    earlier_best = np.full(len(values), _NOBODY, np.int64)
    for one, other, apart in _confirmed(close_pairs(values, most), seen):
        for left, right in ((one, other), (other, one)):
            known = first[right] < _NOBODY
            keys = (apart[known] << _DISTANCE_SHIFT) | first[right][known]
            np.minimum.at(any_best, left[known], keys)
            before = first[right][known] < first[left][known]
            np.minimum.at(earlier_best, left[known][before], keys[before])
    best = np.full(len(hashes), _NOBODY, np.int64)
    best[shown] = any_best[place]
    leads = shown[(shown < train) & (first[place] == shown)]
    best[leads] = earlier_best[place[(shown < train) & (first[place] == shown)]]
    found = best < _NOBODY
    return Twins(
        twin=np.where(found, best & ((1 << _DISTANCE_SHIFT) - 1), -1),
        distance=np.where(found, best >> _DISTANCE_SHIFT, 0),
    )


def _confirmed(
    pairs: Iterator[tuple[Integers, Integers, Integers]], seen: Pictures
) -> Iterator[tuple[Integers, Integers, Integers]]:
    for one, other, apart in pairs:
        same = resemble(seen[one], seen[other])
        yield one[same], other[same], apart[same]


def _together(hashes: Hashes, pictures: Pictures, shown: Integers) -> tuple[Integers, Integers]:
    # hashes [n] of the images `shown` [n] -> the group [n] of each, and its first image [groups].
    _, first, place, counts = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    heads = shown[first].tolist()
    by_hash = np.split(np.argsort(place, kind="stable"), np.cumsum(counts)[:-1])
    for number in np.flatnonzero(counts > 1).tolist():
        group, members = number, by_hash[number]
        while True:
            seen = pictures[shown[members]]
            is_other = ~resemble(seen, seen[:1])
            is_other[0] = False
            place[members[~is_other]] = group
            members = members[is_other]
            if not len(members):
                break
            group = len(heads)
            heads.append(int(shown[members[0]]))
    return place, np.array(heads, np.int64)


def _detail(pictures: Floats) -> Floats:
    # [n, 256] -> [n], root of the mean square of what neighbours differ by, down and across.
    square = pictures.reshape(-1, _PICTURE, _PICTURE)
    down = np.square(np.diff(square, axis=1)).mean(axis=(1, 2))
    across = np.square(np.diff(square, axis=2)).mean(axis=(1, 2))
    detail: Floats = np.sqrt(down + across)
    return detail


def _has_flat_ground(pictures: Floats) -> NDArray[np.bool_]:
    # [n, 256] -> [n]
    ordered = np.sort(pictures, axis=1)
    spans = ordered[:, _GROUND - 1 :] - ordered[:, : 1 - _GROUND]
    found: NDArray[np.bool_] = spans.min(axis=1) <= _ONE_GREY
    return found


def _bits_set(numbers: Hashes) -> Integers:
    counts: Integers = _ONES[numbers.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)
    return counts


def _thumbnail(pixels: NDArray[np.uint8]) -> Floats:
    # [h,w,3] -> float32 [32,32], each the mean over its share of the image.
    height, width = pixels.shape[:2]
    down, across = _shares(height), _shares(width)
    rows = max(1, _BAND // width)
    total = np.zeros((_SIDE, width), np.float32)
    for start in range(0, height, rows):
        band = pixels[start : start + rows]
        grey = band[..., 0] * np.float32(_LUMA[0])
        grey += band[..., 1] * np.float32(_LUMA[1])
        grey += band[..., 2] * np.float32(_LUMA[2])
        total += down[:, start : start + rows] @ grey
    thumbnail: Floats = total @ across.T
    return thumbnail


@lru_cache(maxsize=256)
def _shares(length: int) -> Floats:
    # [32, length]: which share of each of 32 equal parts lies on which pixel.
    edges = np.arange(_SIDE + 1) * (length / _SIDE)
    pixel = np.arange(length)
    high = np.minimum(edges[1:, None], pixel + 1)
    low = np.maximum(edges[:-1, None], pixel)
    shares: Floats = (np.maximum(high - low, 0) * (_SIDE / length)).astype(np.float32)
    return shares


@lru_cache(maxsize=1)
def _frequencies() -> tuple[Floats, Integers, Integers]:
    # The cosine transform [12, 32], and rows and columns of the 64 lowest but the constant one.
    count = 12
    angle = np.pi / _SIDE * np.outer(np.arange(count), np.arange(_SIDE) + 0.5)
    rows, columns = np.indices((count, count)).reshape(2, -1)
    order = np.lexsort((rows, rows + columns))[1 : BITS + 1]
    return np.cos(angle).astype(np.float32), rows[order], columns[order]
