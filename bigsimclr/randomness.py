"""Counter-based random numbers: every draw is a pure function of (seed, stream, counter).

Nothing here holds a state. A draw for image 17 in epoch 3 is the same whichever rank, worker or
restart asks for it, and adding a consumer never moves the draws of another one.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]

_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10

_FEISTEL_ROUNDS: Final = 12
# Narrower networks are measurably uneven over the orders of a handful of items.
_LEAST_BITS: Final = 6
_MOST_ITEMS: Final = 1 << 32


class Stream(IntEnum):
    """What a draw is for; two streams of one seed are independent."""

    ORDER = 1
    VIEWS = 2
    SUBSET = 3
    SPLIT = 4
    WEIGHTS = 5
    SUBSTITUTE = 6
    SHARDS = 16
    WINDOWS = 17
    MIXTURE = 18
    PACK = 19
    PARTS = 20


def philox(seed: int, stream: int, counters: Words) -> Words:
    """Draw four random words per counter with Philox4x32-10.

    The key is (folded seed, stream). A seed below 2^32 is used as it is; of a longer one the high
    32 bits are scrambled (a bijection that keeps 0) and xor-ed into the low ones, so that no seed
    can reach another stream.

    Args:
        seed: The run's seed, 0 <= seed < 2^64.
        stream: A `Stream`, or any number below 2^32.
        counters: uint32 [..., 4].

    Returns:
        uint32 [..., 4], uniform over all words.

    Raises:
        ValueError: The seed is negative or does not fit 64 bits.
    """
    return _philox(_folded(seed), stream, counters)


def uniform(bits: Words) -> npt.NDArray[np.float32]:
    """Turn random words into floats in [0, 1), with the same bits on every device.

    Args:
        bits: uint32 [...]; the upper 24 bits are used.

    Returns:
        float32 [...], multiples of 2^-24.
    """
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def below(bits: Words, limit: int | Integers) -> Integers:
    """Turn random words into integers in [0, limit) by multiplying and shifting.

    Args:
        bits: uint32 [...].
        limit: One number, or int64 [...], 1 <= limit <= 2^32; the bias is at most limit / 2^32.

    Returns:
        int64 [...].
    """
    product = bits.astype(np.uint64) * np.asarray(limit, np.uint64)
    return (product >> _SHIFT).astype(np.int64)


def permuted(
    seed: int,
    epoch: int | Integers,
    positions: Integers,
    n: int,
    *,
    stream: int = Stream.ORDER,
) -> Integers:
    """Map positions of one epoch to items, by a random permutation with random access.

    Args:
        seed: The run's seed.
        epoch: Number of the epoch, or one per position (int64 [...]).
        positions: int64 [...], 0 <= position < n.
        n: Number of items, at most 2^32.
        stream: What the permutation is for.

    Returns:
        int64 [...], item of every position; within an epoch each item appears exactly once.

    Raises:
        ValueError: A position lies outside range(n), or n is not in 1..2^32.
    """
    epochs = np.asarray(epoch, np.int64)
    return _permuted(seed, stream, epoch=epochs, positions=positions, n=n)


def shuffled(seed: int, stream: int, n: int) -> Integers:
    """Return range(n) in random order.

    Args:
        seed: The seed of the draw.
        stream: A `Stream`.
        n: Number of items, at most 2^32.

    Returns:
        int64 [n], a permutation.
    """
    if n == 0:
        return np.zeros(0, np.int64)
    positions = np.arange(n, dtype=np.int64)
    return _permuted(seed, stream, epoch=np.zeros((), np.int64), positions=positions, n=n)


def weights_seed(seed: int) -> int:
    """Derive the seed of the generator that initialises the weights.

    Args:
        seed: The run's seed.

    Returns:
        An integer in [0, 2^63), fit for `torch.Generator.manual_seed`.
    """
    high, low = philox(seed, Stream.WEIGHTS, np.zeros((1, 4), np.uint32))[0, :2].tolist()
    return ((int(high) << 32) | int(low)) >> 1


def _folded(seed: int) -> int:
    if not 0 <= seed < 1 << 64:
        msg = f"a seed must lie in 0..2^64-1, found {seed}"
        raise ValueError(msg)
    high = _scrambled(np.array([seed >> 32], np.uint32))
    return (seed & 0xFFFFFFFF) ^ int(high[0])


def _philox(key_0: int, key_1: int, counters: Words) -> Words:
    # 64-bit words hold the exact 32x32 products; the high halves are masked off as they arise.
    c0, c1, c2, c3 = (counters[..., i].astype(np.uint64) for i in range(4))
    for step in range(_ROUNDS):
        k0 = np.uint64((key_0 + step * _KEY_STEPS[0]) & 0xFFFFFFFF)
        k1 = np.uint64((key_1 + step * _KEY_STEPS[1]) & 0xFFFFFFFF)
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> _SHIFT) ^ c1 ^ k0, second & _LOW
        c2, c3 = (first >> _SHIFT) ^ c3 ^ k1, first & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def _scrambled(words: Words) -> Words:
    # The 32-bit finaliser of MurmurHash3: a bijection in which every input bit reaches every
    # output bit, and far cheaper than a Philox call.
    words = words ^ (words >> np.uint32(16))
    words = words * np.uint32(0x85EBCA6B)
    words = words ^ (words >> np.uint32(13))
    words = words * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def _permuted(seed: int, stream: int, *, epoch: Integers, positions: Integers, n: int) -> Integers:
    positions = np.asarray(positions, np.int64)
    if not 1 <= n <= _MOST_ITEMS:
        msg = f"a permutation needs 1..2^32 items, found {n}"
        raise ValueError(msg)
    if positions.size == 0:
        return positions.copy()
    if positions.min() < 0 or positions.max() >= n:
        msg = f"positions must lie in 0..{n - 1}, found {positions.min()}..{positions.max()}"
        raise ValueError(msg)
    flat = positions.reshape(-1)
    epochs = np.broadcast_to(epoch, positions.shape).reshape(-1) if epoch.ndim else epoch[None]
    keys = _round_keys(seed, stream, epochs, n)
    bits = max(_LEAST_BITS, (n - 1).bit_length())
    items = _feistel(flat.astype(np.uint32), keys, bits)
    # Cycle walking: the network permutes 2^bits >= n numbers, so one that lands outside range(n)
    # is sent round again until it is inside; that keeps the map a bijection of range(n).
    outside = np.flatnonzero(items.astype(np.int64) >= n)
    while outside.size:
        again = _feistel(items[outside], keys[:, outside] if keys.shape[1] > 1 else keys, bits)
        items[outside] = again
        outside = outside[again.astype(np.int64) >= n]
    return items.astype(np.int64).reshape(positions.shape)


def _round_keys(seed: int, stream: int, epochs: Integers, n: int) -> Words:
    # epochs: int64 [E] -> uint32 [rounds, E]; n is part of the counter, so that the orders of two
    # sizes share nothing.
    distinct, which = np.unique(epochs, return_inverse=True)
    counters = np.zeros((distinct.size, _FEISTEL_ROUNDS // 4, 4), np.uint32)
    counters[..., 0] = distinct.astype(np.uint32)[:, None]
    counters[..., 1] = np.uint32(n & 0xFFFFFFFF)
    counters[..., 3] = np.arange(_FEISTEL_ROUNDS // 4, dtype=np.uint32)
    keys = philox(seed, stream, counters).reshape(distinct.size, _FEISTEL_ROUNDS).T
    return keys[:, which.reshape(-1)] if distinct.size > 1 else keys


def _feistel(items: Words, keys: Words, bits: int) -> Words:
    # Two halves, each xor-ed in turn with a keyed scramble of the other: a bijection of
    # `bits`-bit numbers for any round function.
    low_bits = bits // 2
    low_mask, high_mask = np.uint32((1 << low_bits) - 1), np.uint32((1 << (bits - low_bits)) - 1)
    low, high = items & low_mask, items >> np.uint32(low_bits)
    for turn, key in enumerate(keys):
        if turn % 2 == 0:
            high = high ^ (_scrambled(low ^ key) & high_mask)
        else:
            low = low ^ (_scrambled(high ^ key) & low_mask)
    return (high << np.uint32(low_bits)) | low
