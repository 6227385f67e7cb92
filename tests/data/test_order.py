"""Orders of training images against slow references; each a function of (seed, position) alone."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bigsimclr.augment import ViewSettings
from bigsimclr.data import Source, build_data, count_examples
from bigsimclr.data.arrays import ArraySource
from bigsimclr.data.loader import Batch, Loader, view_hash
from bigsimclr.data.mixture import mixed
from bigsimclr.data.order import Mixture, Order, Part, Runs, order_of
from bigsimclr.data.resident import Resident, make_resident
from bigsimclr.data.shards import open_shards
from bigsimclr.data.steps import Means
from bigsimclr.errors import DataError
from bigsimclr.randomness import Stream, permuted, philox
from bigsimclr.recipe.sources import MixData
from tests.data.conftest import Encode
from tests.data.tars import write_samples

Integers = NDArray[np.int64]

SHARDS = np.repeat(np.arange(7), [5, 9, 1, 4, 12, 3, 6])  # of 40 images
SUBSET = np.flatnonzero(np.arange(40) % 3 > 0)


def runs_by_hand(indices: list[int], seed: int, window: int, epoch: int) -> list[int]:
    """Order one epoch with lists alone."""
    shards = sorted({int(SHARDS[index]) for index in indices})
    groups = [[index for index in indices if SHARDS[index] == shard] for shard in shards]
    count = len(groups)
    chosen = permuted(seed, epoch, np.arange(count), count, stream=Stream.SHARDS).tolist()
    windows = [chosen[at : at + window] for at in range(0, count, window)]
    order: list[int] = []
    for number, members in enumerate(windows):
        pool = [index for shard in members for index in groups[shard]]
        key = epoch * len(windows) + number
        picks = permuted(seed, key, np.arange(len(pool)), len(pool), stream=Stream.WINDOWS)
        order += [pool[pick] for pick in picks.tolist()]
    return order


@pytest.mark.parametrize("indices", [np.arange(40), SUBSET], ids=["all", "some"])
@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_runs_are_those_made_by_hand(indices: Integers, window: int) -> None:
    order = order_of(indices, 9, Runs(SHARDS, window))
    expected = [runs_by_hand(indices.tolist(), 9, window, epoch) for epoch in range(3)]
    epochs, found = order.at(np.arange(3 * len(indices)))
    assert epochs.tolist() == np.repeat(np.arange(3), len(indices)).tolist()
    assert found.tolist() == [index for epoch in expected for index in epoch]
    assert all(sorted(epoch) == indices.tolist() for epoch in expected)
    assert expected[0] != expected[1]
    # Random access: any positions, in any order.
    positions = np.random.default_rng(0).permutation(3 * len(indices))[:17]
    assert order.at(positions)[1].tolist() == found[positions].tolist()


def test_runs_keep_to_few_shards_at_a_time() -> None:
    _, found = order_of(np.arange(40), 0, Runs(SHARDS, 2)).at(np.arange(40))
    seen = SHARDS[found]
    borders = np.flatnonzero(np.diff(seen)) + 1
    assert len(borders) > 7  # shuffled within the windows
    first = {shard: int(np.flatnonzero(seen == shard)[0]) for shard in range(7)}
    last = {shard: int(np.flatnonzero(seen == shard)[-1]) for shard in range(7)}
    for position in range(40):
        assert sum(first[s] <= position <= last[s] for s in range(7)) <= 2


def _mixture(*parts: tuple[int, float]) -> Mixture:
    start, made = 0, []
    for size, share in parts:
        made.append(Part(start=start, stop=start + size, share=share, arrangement=None))
        start += size
    return Mixture(tuple(made))


def mixed_by_hand(
    seed: int, parts: list[tuple[int, Integers, int]], positions: int
) -> list[tuple[int, int]]:
    """Walk through positions one by one; parts are (start, images counted from it, places)."""
    orders = []
    for number, (_, own, _) in enumerate(parts):
        # Sources of equal size are not walked through alike.
        low, high = philox(seed, Stream.PARTS, np.array([[number, 0, 0, 0]], np.uint32))[0, :2]
        orders.append(Order(own, int(low) | int(high) << 32))
    walked = []
    for position in range(positions):
        block, rank = divmod(position, 1000)
        slot = int(permuted(seed, block, np.array([rank]), 1000, stream=Stream.MIXTURE)[0])
        for (start, _, places), order in zip(parts, orders, strict=True):
            if slot < places:
                epoch, index = order.at(np.array([block * places + slot]))
                walked.append((int(epoch[0]), int(index[0]) + start))
                break
            slot -= places
    return walked


def test_mixtures_are_those_made_by_hand() -> None:
    mixture = _mixture((30, 2.0), (500, 1.0), (7, 5.0))
    indices = np.concatenate([np.arange(10, 30), np.arange(30, 530), np.arange(530, 537)])
    order = order_of(indices, 4, mixture)
    epochs, found = order.at(np.arange(1500))
    parts = [(0, np.arange(10, 30), 250), (30, np.arange(500), 125), (530, np.arange(7), 625)]
    assert list(zip(epochs.tolist(), found.tolist(), strict=True)) == mixed_by_hand(4, parts, 1500)
    positions = np.random.default_rng(1).integers(0, 10**9, 50)
    again = order.at(positions)
    for at, position in enumerate(positions.tolist()):
        one = order.at(np.array([position]))
        assert (one[0][0], one[1][0]) == (again[0][at], again[1][at])


def test_sources_of_equal_size_are_walked_through_in_orders_of_their_own() -> None:
    order = order_of(np.arange(4000), 0, _mixture((2000, 1.0), (2000, 1.0)))
    _, found = order.at(np.arange(4000))
    first, second = found[found < 2000], found[found >= 2000] - 2000
    assert np.array_equal(np.sort(first), np.arange(2000))
    assert np.array_equal(np.sort(second), np.arange(2000))
    # Of two random orders of 2,000, about one image stands at the same place.
    assert (first == second).sum() < 10


def test_shares_hold_in_every_block_and_no_image_comes_back_early() -> None:
    mixture = _mixture((30, 0.3), (500, 0.2), (7, 0.5))
    epochs, found = order_of(np.arange(537), 0, mixture).at(np.arange(10_000))
    source = np.digitize(found, [30, 530])
    for block in range(10):
        assert np.bincount(source[block * 1000 : block * 1000 + 1000]).tolist() == [300, 200, 500]
    # A source's pass ends before its next one begins, and shows every image once.
    pairs = Counter(zip(epochs.tolist(), found.tolist(), strict=True))
    assert set(pairs.values()) == {1}
    for number, (size, places) in enumerate(((30, 300), (500, 200), (7, 500))):
        passes = np.sort(epochs[source == number])
        whole = 10 * places // size
        assert passes[: whole * size].tolist() == np.repeat(np.arange(whole), size).tolist()


@pytest.mark.parametrize(
    ("shares", "places"),
    [
        ((1, 1, 1), [334, 333, 333]),
        ((1e-9, 1, 1), [1, 500, 499]),
        ((5, 0.001, 0.002), [998, 1, 1]),
        ((1, 2, 4), [143, 286, 571]),
    ],
)
def test_shares_are_rounded_to_thousandths(shares: tuple[float, ...], places: list[int]) -> None:
    mixture = _mixture(*((3, share) for share in shares))
    _, found = order_of(np.arange(9), 0, mixture).at(np.arange(1000))
    counts = np.bincount(found // 3).tolist()
    assert sum(counts) == 1000
    assert counts == places


def test_sources_without_images_in_the_set_take_no_share() -> None:
    mixture = _mixture((3, 1.0), (3, 1.0), (3, 2.0))
    _, found = order_of(np.array([1, 7, 8]), 0, mixture).at(np.arange(3000))
    # Shares 1 and 2 of three: 333 and 667 of every 1,000.
    assert Counter(found.tolist()) in ({1: 999, 7: 1001, 8: 1000}, {1: 999, 7: 1000, 8: 1001})


def test_substitutes_are_of_the_set_and_the_same_in_every_order() -> None:
    orders = [
        order_of(SUBSET, 3, arrangement)
        for arrangement in (None, Runs(SHARDS, 2), _mixture((20, 1.0), (20, 2.0)))
    ]
    for attempt in range(20):
        found = {order.substitute(epoch=2, index=5, attempt=attempt) for order in orders}
        assert len(found) == 1
        assert found <= set(SUBSET.tolist())


def _loader(source: Source, *, workers: int = 0, **keys: int) -> Loader:
    return Loader(
        source,
        indices=np.arange(len(source)),
        labels=source.labels,
        settings=ViewSettings(image_size=8),
        views=2,
        seed=1,
        global_batch=12,
        means=Means(workers=workers),
        **keys,
    )


@pytest.fixture
def shards(tmp_path: Path, png: Encode) -> Path:
    rng = np.random.default_rng(0)
    for shard in range(6):
        images = {
            f"{shard}{n}.png": png(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            for n in range(5)
        }
        write_samples(tmp_path / f"set/{shard}.tar", images)
    return tmp_path / "set"


def _arrays(count: int, side: int, classes: tuple[str, ...]) -> ArraySource:
    rng = np.random.default_rng(count)
    return ArraySource(
        rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        np.arange(count) % len(classes),
        classes=classes,
        prefix=f"picture-{count}",
    )


@pytest.mark.parametrize("kind", ["runs", "mix"])
def test_one_view_hash_over_ranks_workers_and_resumption(kind: str, shards: Path) -> None:
    source: Source = open_shards(shards, "*.tar", window=2)
    if kind == "mix":
        source = mixed([source, _arrays(8, 5, ("a", "b"))], [1.0, 2.0])
    whole = Batch.join(list(_loader(source).batches(24, 6)))
    expected = view_hash(whole)
    for world_size, workers in ((1, 2), (2, 0), (3, 1), (4, 3)):
        ranks = [
            list(_loader(source, rank=rank, world_size=world_size, workers=workers).batches(24, 6))
            for rank in range(world_size)
        ]
        steps = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert view_hash(Batch.join(steps)) == expected
    parts = [batch for at in range(6) for batch in _loader(source).batches(24 + 12 * at, 1)]
    assert view_hash(Batch.join(parts)) == expected
    # Residents keep the order of what they hold.
    if kind == "runs":
        import torch

        resident = make_resident(source, device=torch.device("cpu"), workers=0, max_pixels=99)
        assert isinstance(resident, Resident)
        again = Batch.join(list(_loader(resident).batches(24, 6)))
        assert again.indices.tolist() == whole.indices.tolist()


def test_mixed_sources_are_one_source(tmp_path: Path) -> None:
    first, second = _arrays(4, 5, ("cat", "dog")), _arrays(6, 7, ("dog", "owl", "cat"))
    both = mixed([first, second], [None, None])
    assert both.classes == ("cat", "dog", "owl")
    assert both.labels.tolist() == [0, 1, 0, 1, 1, 2, 0, 1, 2, 0]
    assert both.arrangement is None
    assert (both.name(3), both.name(4)) == ("picture-4-000003", "picture-6-000000")
    for index in range(10):
        part, within = (first, index) if index < 4 else (second, index - 4)
        sample = both.read(index)
        assert np.array_equal(sample.image, part.images[within])
        assert (sample.index, sample.label) == (index, both.labels[index])
    assert mixed([first, first], [None, None]).name(5) == "1/picture-4-000001"
    found = {
        mixed([first, second], weights).fingerprint for weights in ([None] * 2, [1, 1], [1, 2])
    }
    assert len(found) == 3
    with pytest.raises(DataError, match="several classes of one name"):
        mixed([_arrays(4, 5, ("cat", "cat"))], [None])


def test_mixtures_come_from_recipes(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", images=np.zeros((8, 6, 6, 3), np.uint8), labels=np.arange(8) % 2 + 3
    )
    sources: list[dict[str, object]] = [
        {"weight": 3.0, "data": {"kind": "digits"}},
        {
            "weight": 1.0,
            "data": {"kind": "arrays", "root": str(tmp_path / "a.npz"), "held_out_fraction": 0.25},
        },
    ]
    section = MixData.model_validate_json(json.dumps({"kind": "mix", "sources": sources}))
    splits = build_data(section)
    assert splits.held_out is not None
    assert count_examples(section) == (len(splits.train), len(splits.held_out))
    assert len(splits.train) == 1437 + 6
    assert splits.train.classes == splits.held_out.classes == tuple("0123456789")
    batch = Batch.join(list(_loader(splits.train).batches(0, 250)))
    assert int((batch.indices >= 1437).sum()) == 750
    del sources[0]["weight"]
    with pytest.raises(ValueError, match="give every source a weight, or none"):
        MixData.model_validate_json(json.dumps({"kind": "mix", "sources": sources}))
    shards = {"kind": "shards", "root": "a", "order": "runs"}
    runs = [{"data": shards}, {"data": sources[0]["data"]}]
    with pytest.raises(ValueError, match="order: runs needs a weight for every source"):
        MixData.model_validate_json(json.dumps({"kind": "mix", "sources": runs}))
