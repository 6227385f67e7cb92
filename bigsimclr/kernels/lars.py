"""The three launches of a LARS update of many tensors, whatever their sizes, groups and types.

`bigsimclr.kernels.lars_update` makes them and their tables. The plain reference is
`bigsimclr.optim.lars.LARS`, in all its options. Launch by launch:

* `square` sums, chunk by chunk, the squares of the weights and of what they are set against: the
  decayed gradient, or where `classic` is off its momentum, which is then advanced here.
* `scale` adds up each tensor's chunks in their order, and makes trust ratio times rate.
* `move` updates momentum and weights, and writes a bf16 copy of the weights where there is one.

In float32 that moves 30 bytes for every weight: 8 in `square`, 20 in `move`, 2 for the copy. No
value goes back to the host, and nothing is summed in order of arrival.

Shapes: P tensors, C chunks of all of them together. The table of addresses is int64 [7, P].
"""

from dataclasses import dataclass
from typing import Final

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tiles:
    """What a program works on at a time, and with what."""

    chunk: int  # values; a multiple of VECTOR
    warps: int
    block: int  # chunks that `scale` adds up at once


TILES: Final = Tiles(chunk=2048, warps=8, block=1024)
"""Most kernels of the networks have a multiple of 4096 values, and then no chunk is cut short.
Eight values a thread leave room for four programs on a processor, whose memory accesses fill each
other's gaps; at twice as many it is two. The largest network has 425,000 chunks."""
VECTOR: Final = 16  # bytes that a thread moves at once, and values that share a mask

# Rows of the table; the last two are no addresses.
_WEIGHT = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)  # 0: there is none, and the tensor is left alone
_MOMENTUM = tl.constexpr(2)
_WORKING = tl.constexpr(3)  # 0: there is none
_RATE = tl.constexpr(4)
_KIND = tl.constexpr(5)  # of the gradient: 0 float32, 1 bf16, 2 fp16
_ALIGNED = tl.constexpr(6)  # addresses and size are multiples of VECTOR
ROWS: Final = 7


@triton.jit
def _place(address, begin, left, TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Return pointers to a chunk of a tensor, and which of them are inside it."""
    start = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        # Four values of a thread at once, in every type: more of the shorter ones would have to be
        # exchanged between threads.
        start = tl.multiple_of(start, 4 * TYPE.primitive_bitwidth // 8)
        left = left // 16 * 16
    values = tl.arange(0, CHUNK)
    return start + begin + values, values < left


@triton.jit
def _load(address, begin, left, TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Return a chunk in float32, 0 beyond its end."""
    pointers, is_inside = _place(address, begin, left, TYPE, ALIGNED, CHUNK)
    return tl.load(pointers, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _store(
    address, begin, left, values, TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):
    """Write a chunk."""
    pointers, is_inside = _place(address, begin, left, TYPE, ALIGNED, CHUNK)
    tl.store(pointers, values.to(TYPE), mask=is_inside)


@triton.jit
def _slope(address, kind, begin, left, weights, decay, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Return a chunk of the decayed gradient."""
    if kind == 0:
        gradient = _load(address, begin, left, tl.float32, ALIGNED, CHUNK)
    elif kind == 1:
        gradient = _load(address, begin, left, tl.bfloat16, ALIGNED, CHUNK)
    else:
        gradient = _load(address, begin, left, tl.float16, ALIGNED, CHUNK)
    return gradient + decay * weights


@triton.jit
def _chunk(owners, firsts, sizes, chunk, CHUNK: tl.constexpr):
    """Return a chunk's tensor, its first value there, and how many follow at most."""
    tensor = tl.load(owners + chunk)
    begin = (chunk - tl.load(firsts + tensor)).to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(sizes + tensor) - begin, CHUNK).to(tl.int32)
    return tensor, begin, left


@triton.jit
def _square_chunk(
    weight,
    gradient,
    buffer,
    kind,
    begin,
    left,
    decay,
    momentum,
    CLASSIC: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the sums of squares of the weights and of their direction; perhaps advance momenta."""
    weights = _load(weight, begin, left, tl.float32, ALIGNED, CHUNK)
    direction = _slope(gradient, kind, begin, left, weights, decay, ALIGNED, CHUNK)
    if not CLASSIC:
        slope = direction
        direction = momentum * _load(buffer, begin, left, tl.float32, ALIGNED, CHUNK) + slope
        _store(buffer, begin, left, direction, tl.float32, ALIGNED, CHUNK)
        if NESTEROV:
            direction = momentum * direction + slope
    return tl.sum(weights * weights, axis=0), tl.sum(direction * direction, axis=0)


@triton.jit(do_not_specialize=["tensors", "chunks"])
def square(
    table,
    owners,
    firsts,
    sizes,
    decays,
    adapts,
    sums,
    tensors,
    chunks,
    momentum,
    CLASSIC: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum the squares of one chunk, where its tensor adapts."""
    chunk = tl.program_id(0)
    tensor, begin, left = _chunk(owners, firsts, sizes, chunk, CHUNK)
    gradient = tl.load(table + _GRADIENT * tensors + tensor)
    is_wanted = gradient != 0
    if CLASSIC:
        is_wanted = is_wanted & (tl.load(adapts + tensor) != 0)
    if is_wanted:
        weight = tl.load(table + _WEIGHT * tensors + tensor)
        buffer = tl.load(table + _MOMENTUM * tensors + tensor)
        kind = tl.load(table + _KIND * tensors + tensor)
        decay = tl.load(decays + tensor)
        if tl.load(table + _ALIGNED * tensors + tensor) != 0:
            first, second = _square_chunk(
                weight, gradient, buffer, kind, begin, left, decay, momentum,
                CLASSIC, NESTEROV, ALIGNED=True, CHUNK=CHUNK,
            )  # fmt: skip
        else:
            first, second = _square_chunk(
                weight, gradient, buffer, kind, begin, left, decay, momentum,
                CLASSIC, NESTEROV, ALIGNED=False, CHUNK=CHUNK,
            )  # fmt: skip
        tl.store(sums + chunk, first)
        tl.store(sums + chunks + chunk, second)


@triton.jit(do_not_specialize=["tensors", "chunks"])
def scale(
    table,
    firsts,
    adapts,
    sums,
    norms,
    factors,
    tensors,
    chunks,
    trust_coefficient,
    SUMS: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make one tensor's norms from its chunks, and its factor from its norms, or one of the two."""
    tensor = tl.program_id(0)
    is_adapted = tl.load(adapts + tensor) != 0
    if SUMS:
        first = tl.load(firsts + tensor)
        last = first
        if is_adapted & (tl.load(table + _GRADIENT * tensors + tensor) != 0):
            last = tl.load(firsts + tensor + 1)
        of_weights = tl.zeros([BLOCK], tl.float32)
        of_direction = tl.zeros([BLOCK], tl.float32)
        for begin in range(first, last, BLOCK):
            places = begin + tl.arange(0, BLOCK)
            of_weights += tl.load(sums + places, mask=places < last, other=0.0)
            of_direction += tl.load(sums + chunks + places, mask=places < last, other=0.0)
        weights = tl.sqrt_rn(tl.sum(of_weights, axis=0))
        direction = tl.sqrt_rn(tl.sum(of_direction, axis=0))
        tl.store(norms + tensor, weights)
        tl.store(norms + tensors + tensor, direction)
    else:
        weights = tl.load(norms + tensor)
        direction = tl.load(norms + tensors + tensor)
    if FACTORS:
        rate = tl.load(tl.load(table + _RATE * tensors + tensor).to(tl.pointer_type(tl.float32)))
        is_known = is_adapted & (weights > 0) & (direction > 0)
        trust = trust_coefficient * weights / tl.where(is_known, direction, 1.0)
        trust = tl.where(is_known, trust, 1.0)
        tl.store(factors + tensor, trust * rate)


@triton.jit
def _move_chunk(
    weight,
    gradient,
    buffer,
    working,
    kind,
    begin,
    left,
    decay,
    factor,
    momentum,
    CLASSIC: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update a chunk of weights, and of momenta where `square` has not."""
    weights = _load(weight, begin, left, tl.float32, ALIGNED, CHUNK)
    buffers = _load(buffer, begin, left, tl.float32, ALIGNED, CHUNK)
    step = buffers
    if CLASSIC or NESTEROV:
        step = _slope(gradient, kind, begin, left, weights, decay, ALIGNED, CHUNK)
    if CLASSIC:
        step *= factor
        buffers = momentum * buffers + step
        _store(buffer, begin, left, buffers, tl.float32, ALIGNED, CHUNK)
    if NESTEROV:
        step = momentum * buffers + step
    elif CLASSIC:
        step = buffers
    if not CLASSIC:
        step *= factor
    weights -= step
    _store(weight, begin, left, weights, tl.float32, ALIGNED, CHUNK)
    if working != 0:
        _store(working, begin, left, weights, tl.bfloat16, ALIGNED, CHUNK)


@triton.jit(do_not_specialize=["tensors", "chunks"])
def move(
    table,
    owners,
    firsts,
    sizes,
    decays,
    factors,
    tensors,
    chunks,
    momentum,
    CLASSIC: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update one chunk."""
    # Backwards: what was read last may still be in the cache, 50 MB of an H100.
    chunk = chunks - 1 - tl.program_id(0)
    tensor, begin, left = _chunk(owners, firsts, sizes, chunk, CHUNK)
    gradient = tl.load(table + _GRADIENT * tensors + tensor)
    if gradient != 0:
        weight = tl.load(table + _WEIGHT * tensors + tensor)
        buffer = tl.load(table + _MOMENTUM * tensors + tensor)
        working = tl.load(table + _WORKING * tensors + tensor)
        kind = tl.load(table + _KIND * tensors + tensor)
        decay = tl.load(decays + tensor)
        factor = tl.load(factors + tensor)
        if tl.load(table + _ALIGNED * tensors + tensor) != 0:
            _move_chunk(
                weight, gradient, buffer, working, kind, begin, left, decay, factor, momentum,
                CLASSIC, NESTEROV, ALIGNED=True, CHUNK=CHUNK,
            )  # fmt: skip
        else:
            _move_chunk(
                weight, gradient, buffer, working, kind, begin, left, decay, factor, momentum,
                CLASSIC, NESTEROV, ALIGNED=False, CHUNK=CHUNK,
            )  # fmt: skip
