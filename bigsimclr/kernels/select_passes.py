"""The Triton kernels of selective kernels; `kernels.select` launches them, and has their names.

A ReLU is shut where z <= 0, which NaN is not, as in PyTorch. All four kernels compute z by the same
operations, so that they agree on it.
"""

import triton
import triton.language as tl


@triton.jit
def _one_stream(F, parts, FEATURES: tl.constexpr):
    """Return image, part, features and channels of a program that works on one stream.

    The two streams of some features follow each other: the gradient they share is then read from
    the cache the second time.
    """
    program = tl.program_id(0)
    columns = 2 * tl.cdiv(F, FEATURES)
    column = program % columns
    row = program // columns
    feature = column // 2 * FEATURES + tl.arange(0, FEATURES)
    return row // parts, row % parts, feature, column % 2 * F + feature


@triton.jit
def _load_norm(mean, variance, weight, bias, channel, inside, epsilon):
    """Return rows [1, FEATURES] of mean, 1 / deviation, slope and shift."""
    centre = tl.load(mean + channel, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.load(variance + channel, inside, 0.0).to(tl.float32) + epsilon)
    slope = tl.load(weight + channel, inside, 0.0).to(tl.float32) * inverse
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    return centre[None, :], inverse[None, :], slope[None, :], shift[None, :]


@triton.jit
def _load_row(matrix, row, C, channel, inside):
    """Return [1, FEATURES] of a matrix [rows, C]."""
    return tl.load(matrix + row * C + channel, inside, 0.0).to(tl.float32)[None, :]


@triton.jit
def _image(tensor, image, P, C):
    """Return where an image of [N, P, C] begins, which large batches have beyond 2^31."""
    return tensor + image.to(tl.int64) * P * C


@triton.jit
def _positions(part, tiles, tile, POSITIONS: tl.constexpr):
    """Return [POSITIONS, 1] positions of a tile in a part of an image."""
    return ((part * tiles + tile) * POSITIONS + tl.arange(0, POSITIONS))[:, None]


@triton.jit
def pool(
    inputs, mean, variance, weight, bias, sums, N, P, F, parts, tiles, epsilon,
    POSITIONS: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum a stream, and where it is open 1 and yhat: sums [parts, 3, N, C]."""
    image, part, feature, channel = _one_stream(F, parts, FEATURES)
    inside = feature < F
    centre, inverse, slope, shift = _load_norm(
        mean, variance, weight, bias, channel, inside, epsilon
    )
    own = _image(inputs, image, P, 2 * F)
    total = tl.zeros([POSITIONS, FEATURES], tl.float32)
    opened = tl.zeros([POSITIONS, FEATURES], tl.float32)
    normal = tl.zeros([POSITIONS, FEATURES], tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):
        position = _positions(part, tiles, tile, POSITIONS)
        here = (position < P) & inside[None, :]
        value = tl.load(own + position * (2 * F) + channel[None, :], here, 0.0).to(tl.float32)
        centred = value - centre
        z = centred * slope + shift
        shut = (z <= 0) | (position >= P)
        total += tl.where(shut, 0.0, z)
        opened += tl.where(shut, 0.0, 1.0)
        normal += tl.where(shut, 0.0, centred)
    matrix = N * 2 * F
    row = sums + part * 3 * matrix + image * 2 * F + channel
    tl.store(row, tl.sum(total, 0), inside)
    tl.store(row + matrix, tl.sum(opened, 0), inside)
    tl.store(row + 2 * matrix, tl.sum(normal * inverse, 0), inside)


@triton.jit
def mix(
    inputs, mean, variance, weight, bias, chosen, mixed, N, P, F, parts, tiles, epsilon,
    POSITIONS: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the mixed streams [N, P, F], weighted by chosen [N, C]."""
    program = tl.program_id(0)
    columns = tl.cdiv(F, FEATURES)
    row = program // columns
    # The last images first: `pool` read them last, and the cache may hold them still.
    image, part = N - 1 - row // parts, row % parts
    first = program % columns * FEATURES + tl.arange(0, FEATURES)
    inside = first < F
    centre_1, _, slope_1, shift_1 = _load_norm(mean, variance, weight, bias, first, inside, epsilon)
    centre_2, _, slope_2, shift_2 = _load_norm(
        mean, variance, weight, bias, F + first, inside, epsilon
    )
    weight_1 = _load_row(chosen, image, 2 * F, first, inside)
    weight_2 = _load_row(chosen, image, 2 * F, F + first, inside)
    own = _image(inputs, image, P, 2 * F)
    result = _image(mixed, image, P, F)
    for tile in tl.range(tiles, num_stages=STAGES):
        position = _positions(part, tiles, tile, POSITIONS)
        here = (position < P) & inside[None, :]
        place = position * (2 * F) + first[None, :]
        z_1 = (tl.load(own + place, here, 0.0).to(tl.float32) - centre_1) * slope_1 + shift_1
        z_2 = (tl.load(own + place + F, here, 0.0).to(tl.float32) - centre_2) * slope_2 + shift_2
        both = tl.where(z_1 <= 0, 0.0, z_1) * weight_1 + tl.where(z_2 <= 0, 0.0, z_2) * weight_2
        tl.store(result + position * F + first[None, :], both, here)


@triton.jit
def mix_backward(
    inputs, mean, variance, weight, bias, gradient, sums, N, P, F, parts, tiles, epsilon,
    POSITIONS: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum g and g yhat where the stream is open: sums [parts, 2, N, C]."""
    image, part, feature, channel = _one_stream(F, parts, FEATURES)
    inside = feature < F
    centre, inverse, slope, shift = _load_norm(
        mean, variance, weight, bias, channel, inside, epsilon
    )
    own = _image(inputs, image, P, 2 * F)
    of_mixed = _image(gradient, image, P, F)
    total = tl.zeros([POSITIONS, FEATURES], tl.float32)
    normal = tl.zeros([POSITIONS, FEATURES], tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):
        position = _positions(part, tiles, tile, POSITIONS)
        here = (position < P) & inside[None, :]
        value = tl.load(own + position * (2 * F) + channel[None, :], here, 0.0).to(tl.float32)
        g = tl.load(of_mixed + position * F + feature[None, :], here, 0.0).to(tl.float32)
        centred = value - centre
        g = tl.where(centred * slope + shift <= 0, 0.0, g)
        total += g
        normal += g * centred
    matrix = N * 2 * F
    row = sums + part * 2 * matrix + image * 2 * F + channel
    tl.store(row, tl.sum(total, 0), inside)
    tl.store(row + matrix, tl.sum(normal * inverse, 0), inside)


@triton.jit
def pool_backward(
    inputs, mean, variance, weight, bias, gradient, chosen, everywhere, sums, share, toward,
    N, P, F, parts, tiles, epsilon,
    POSITIONS: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the inputs.

    Shapes:
        gradient: [N, P, F], g.
        chosen: [N, C].
        everywhere: [N, C], d of every position.
        sums: [2, C] over all ranks, of dz and of dz yhat.
        share: of one value in a mean over all ranks.
        toward: [N, P, C] out.
    """
    image, part, feature, channel = _one_stream(F, parts, FEATURES)
    image = N - 1 - image  # as in `mix`
    inside = feature < F
    centre, inverse, slope, shift = _load_norm(
        mean, variance, weight, bias, channel, inside, epsilon
    )
    weighted = _load_row(chosen, image, 2 * F, channel, inside)
    added = _load_row(everywhere, image, 2 * F, channel, inside)
    average = _load_row(sums, 0, 2 * F, channel, inside) * share
    tilt = _load_row(sums, 1, 2 * F, channel, inside) * share * inverse
    own = _image(inputs, image, P, 2 * F)
    of_mixed = _image(gradient, image, P, F)
    result = _image(toward, image, P, 2 * F)
    for tile in tl.range(tiles, num_stages=STAGES):
        position = _positions(part, tiles, tile, POSITIONS)
        here = (position < P) & inside[None, :]
        place = position * (2 * F) + channel[None, :]
        g = tl.load(of_mixed + position * F + feature[None, :], here, 0.0).to(tl.float32)
        centred = tl.load(own + place, here, 0.0).to(tl.float32) - centre
        dz = tl.where(centred * slope + shift <= 0, 0.0, g * weighted + added)
        tl.store(result + place, (dz - average - centred * tilt) * slope, here)
