import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bigsimclr.data.alike import close_pairs, find_twins, look_of, resemble

Hashes = NDArray[np.uint64]


def clustered(count: int, *, seed: int) -> Hashes:
    """Random hashes, half of them a few bits from another one, some of them equal."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    for place in rng.permutation(count)[: count // 2]:
        flips = rng.choice(64, rng.integers(0, 12), replace=False)
        mask = sum(1 << int(bit) for bit in flips)
        hashes[place] = hashes[rng.integers(count)] ^ np.uint64(mask)
    return hashes


def distance(one: int, other: int) -> int:
    return (int(one) ^ int(other)).bit_count()


@pytest.mark.parametrize("most", [0, 1, 4, 7, 12])
def test_all_close_pairs_are_found_and_no_others(most: int) -> None:
    hashes = np.unique(clustered(400, seed=most))
    expected = {
        (one, other): apart
        for one in range(len(hashes))
        for other in range(one + 1, len(hashes))
        if (apart := distance(hashes[one], hashes[other])) <= most
    }
    assert len(expected) > 4 or most == 0
    found = {
        (min(one, other), max(one, other)): apart
        for some in close_pairs(hashes, most)
        for one, other, apart in zip(*(part.tolist() for part in some), strict=True)
    }
    assert found == expected


def test_pairs_at_the_limit_are_found_wherever_their_bits_differ() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        one = int(rng.integers(0, 1 << 63))
        flips = [int(bit) for bit in rng.choice(64, 5, replace=False)]
        other = one ^ sum(1 << bit for bit in flips)
        pair = np.array([one, other], np.uint64)
        assert sum(len(part[0]) for part in close_pairs(pair, 5)) > 0
        assert not sum(len(part[0]) for part in close_pairs(pair, 4))


@pytest.mark.parametrize("train", [0, 1, 150, 300])
def test_twins_are_those_of_a_plain_search(train: int) -> None:
    hashes = clustered(300, seed=train)
    rng = np.random.default_rng(1)
    has_hash = rng.random(300) < 0.9
    kinds = rng.integers(0, 2, 300)  # of one another's noise no picture reminds
    pictures = rng.integers(0, 256, (2, 256), dtype=np.uint8)[kinds]
    found = find_twins(hashes, has_hash, pictures, train=train, most=6)
    for number in range(300):
        best = min(
            (
                (apart, other)
                for other in range(min(number, train))
                if has_hash[other] and has_hash[number] and kinds[other] == kinds[number]
                if (apart := distance(hashes[number], hashes[other])) <= 6
            ),
            default=(0, -1),
        )
        assert (found.distance[number], found.twin[number]) == best, number
    if train == 150:
        assert (found.twin >= 0).sum() > 15


def test_images_of_one_hash_are_told_apart_by_their_pictures() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 256), dtype=np.uint8)[[0, 1, 0, 2, 1, 2, 0]]
    hashes = np.full(7, 99, np.uint64)
    found = find_twins(hashes, np.ones(7, np.bool_), pictures, train=5, most=4)
    assert found.twin.tolist() == [-1, -1, 0, -1, 1, 3, 0]
    assert found.distance.tolist() == [0] * 7


def photograph(seed: int, side: int = 160) -> NDArray[np.uint8]:
    """Smooth random colours with a little noise, uint8 [side, 5/4 side, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    large = np.asarray(small.resize((side * 5 // 4, side), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(large + rng.integers(-9, 10, large.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def hashed(pixels: NDArray[np.uint8]) -> int:
    found = look_of(pixels)
    assert found is not None
    return found.hash


def test_copies_of_a_picture_hash_alike_and_other_pictures_do_not() -> None:
    hashes = [hashed(photograph(seed)) for seed in range(40)]
    for seed, expected in enumerate(hashes):
        pixels = photograph(seed)
        image = Image.fromarray(pixels)
        for copy in (
            jpeg(pixels, 40),
            np.asarray(image.resize((100, 80), Image.Resampling.BICUBIC)),
            np.asarray(image.resize((64, 64), Image.Resampling.BOX)),
            np.clip(pixels.astype(int) + 10, 0, 255).astype(np.uint8),
            np.repeat(np.repeat(pixels, 3, axis=0), 2, axis=1),
        ):
            assert distance(expected, hashed(copy)) <= 4
    apart = [distance(one, other) for at, one in enumerate(hashes) for other in hashes[:at]]
    assert min(apart) > 8


def seen(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    found = look_of(pixels)
    assert found is not None
    return np.frombuffer(found.picture, np.uint8)[None]


def test_the_small_picture_is_that_of_plain_means() -> None:
    pixels = photograph(3, side=64)[:64, :64]
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    deviation = grey.reshape(32, 2, 32, 2).mean(axis=(1, 3)).std()
    means = grey.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    expected = 128 + 24 * (means - means.mean()) / deviation
    assert np.abs(seen(pixels)[0] - expected.ravel()).max() < 0.51


def test_simple_images_on_flat_ground_must_be_closer_to_resemble() -> None:
    rings = [drawn(radius) for radius in (40, 42)]
    assert not resemble(seen(rings[0]), seen(rings[1])).any()
    for ring in rings:
        smaller = np.asarray(Image.fromarray(ring).resize((64, 64), Image.Resampling.BOX))
        for copy in (jpeg(ring, 50), smaller, ring // 2 + 40):
            assert resemble(seen(ring), seen(copy)).all()


def drawn(radius: int) -> NDArray[np.uint8]:
    """A grey ring on white ground, uint8 [128, 128, 3]."""
    image = Image.new("RGB", (128, 128), "white")
    box = (64 - radius, 64 - radius, 64 + radius, 64 + radius)
    ImageDraw.Draw(image).ellipse(box, outline=(90, 90, 90), width=16)
    return np.asarray(image)


def test_the_hash_is_that_of_a_plain_cosine_transform() -> None:
    pixels = photograph(3, side=64)[:64, :64]
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    thumbnail = grey.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    place = np.arange(32) + 0.5
    places = sorted((u + v, v, u) for u in range(12) for v in range(12))[1:65]
    low = []
    for total, row, _ in places:
        down, across = (np.cos(np.pi / 32 * place * wave) for wave in (row, total - row))
        low.append(float((thumbnail * np.outer(down, across)).sum()))
    middle = float(np.median(low))
    bits = "".join("1" if value > middle else "0" for value in low)
    assert hashed(pixels) == int(bits, 2)


def test_large_images_are_hashed_in_bands() -> None:
    pixels = np.repeat(np.repeat(photograph(5), 16, axis=0), 16, axis=1)  # 8 megapixels
    assert distance(hashed(pixels), hashed(photograph(5))) <= 2


@pytest.mark.parametrize("shape", [(40, 40), (15, 400), (1, 30_000)])
def test_plain_and_tiny_images_have_no_hash(shape: tuple[int, int]) -> None:
    flat = np.full((*shape, 3), 130, np.uint8)
    assert look_of(flat) is None
    if min(shape) < 16:
        noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        assert look_of(noise) is None
