"""Random draws are pure functions of their counters, with frozen values."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from bigsimclr import randomness
from bigsimclr.randomness import (
    Stream,
    below,
    permuted,
    philox,
    shuffled,
    uniform,
    weights_seed,
)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF,) * 4,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(key, counter, expected):
    # Seeds below 2^32 and streams are the two key words as they are.
    words = philox(key[0], key[1], np.array([counter], np.uint32))
    assert words.tolist() == [list(expected)]


def test_a_batch_of_counters_gives_what_each_gives_alone():
    counters = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    together = philox(9, Stream.VIEWS, counters)
    for i in range(2):
        for j in range(3):
            assert (philox(9, Stream.VIEWS, counters[i, j]) == together[i, j]).all()


def test_streams_and_all_64_bits_of_the_seed_matter():
    counter = np.zeros((1, 4), np.uint32)
    seeds = [0, 1, 1 << 31, 1 << 32, 1 << 33, 1 << 63, (1 << 64) - 1]
    drawn = {
        tuple(philox(seed, stream, counter)[0].tolist()) for seed in seeds for stream in Stream
    }
    assert len(drawn) == len(seeds) * len(Stream)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        philox(seed, Stream.VIEWS, np.zeros((1, 4), np.uint32))


def test_uniform_keeps_the_upper_24_bits():
    bits = np.array([0, 255, 256, 0x80000000, 0xFFFFFFFF], np.uint32)
    floats = uniform(bits)
    assert floats.dtype == np.float32
    assert floats.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]


def test_below_covers_its_range_evenly():
    counters = np.zeros((6000, 4), np.uint32)
    counters[:, 0] = np.arange(6000)
    drawn = below(philox(3, Stream.VIEWS, counters)[:, 0], 6)
    assert chisquare(np.bincount(drawn, minlength=6)).pvalue > 1e-3
    assert below(np.array([0xFFFFFFFF], np.uint32), 1 << 32).tolist() == [0xFFFFFFFF]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 63, 64, 65, 1437, 100003])
def test_an_epoch_visits_every_item_once(n):
    items = permuted(5, 2, np.arange(n), n)
    assert (np.sort(items) == np.arange(n)).all()


@given(st.integers(1, 400), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_any_seed_and_epoch_permute(n, seed, epoch):
    assert set(permuted(seed, epoch, np.arange(n), n).tolist()) == set(range(n))


def test_positions_are_random_access_and_epochs_may_vary_by_position():
    n = 1437
    whole = np.stack([permuted(1, epoch, np.arange(n), n) for epoch in range(3)])
    assert permuted(1, 2, np.array([[5], [1000]]), n).tolist() == whole[2, [[5], [1000]]].tolist()
    epochs = np.array([0, 0, 1, 2, 1])
    positions = np.array([7, 8, 7, 0, 1436])
    assert permuted(1, epochs, positions, n).tolist() == whole[epochs, positions].tolist()
    assert not (whole[0] == whole[1]).all()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(n):
    epochs = 12_000
    positions = np.tile(np.arange(n), epochs)
    orders = permuted(1, np.repeat(np.arange(epochs), n), positions, n).reshape(-1, n)
    counts = [int((orders == order).all(axis=1).sum()) for order in permutations(range(n))]
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("n", [64, 100])
def test_neighbours_are_independent(n):
    epochs = 20_000
    positions = np.tile([0, 1], epochs)
    pairs = permuted(2, np.repeat(np.arange(epochs), 2), positions, n).reshape(-1, 2)
    assert chisquare(np.bincount(pairs[:, 0], minlength=n)).pvalue > 1e-3
    distance = (pairs[:, 0] - pairs[:, 1]) % n
    assert chisquare(np.bincount(distance, minlength=n)[1:]).pvalue > 1e-3


# Frozen: another order would change every published run.
FROZEN_ORDER = {
    (0, 0, 7): [6, 3, 0, 5, 1, 4, 2],
    (0, 1, 7): [3, 4, 2, 1, 5, 6, 0],
    (7, 0, 1437): [162, 367, 647, 1116, 216, 789, 44],
    (7, 3, 1437): [1161, 735, 1070, 1255, 1404, 1033, 1245],
    (2**40 + 1, 2, 100003): [40062, 97514, 18887, 95210, 62162, 73917, 81394],
}


@pytest.mark.parametrize(("key", "expected"), FROZEN_ORDER.items())
def test_the_order_is_frozen(key, expected):
    seed, epoch, n = key
    assert permuted(seed, epoch, np.arange(n)[:7], n).tolist() == expected


@pytest.mark.parametrize(("positions", "n"), [([5], 5), ([-1], 5), ([0], 0), ([0], (1 << 32) + 1)])
def test_positions_outside_the_items_are_refused(positions, n):
    with pytest.raises(ValueError, match=r"positions|items"):
        permuted(0, 0, np.array(positions), n)


def test_no_positions_give_no_items():
    assert permuted(0, 0, np.zeros(0, np.int64), 5).shape == (0,)


def test_shuffles_differ_by_stream_and_seed():
    orders = [
        shuffled(seed, stream, 50).tolist()
        for seed in (0, 1)
        for stream in (Stream.SUBSET, Stream.SPLIT)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled(0, Stream.SPLIT, 0).shape == (0,)


def test_the_weights_seed_fits_a_torch_generator_and_is_frozen():
    assert all(0 <= weights_seed(seed) < 1 << 63 for seed in range(200))
    assert len({weights_seed(seed) for seed in range(200)}) == 200
    assert weights_seed(0) == 6281368847120885113


def test_numpys_own_generator_is_not_touched():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - the state is what is tested
    shuffled(0, Stream.SUBSET, 100)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert randomness.Stream.ORDER == 1
