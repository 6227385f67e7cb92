"""Cases of `benchmarks.sweep` bound by memory: batch norm, selective kernels, and the max-pool."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.sweep_cases import BF16_ROUNDING, Candidate, Case, Work, number_type
from bigsimclr.kernels import max_pool, norm_act, norm_gradients, norm_statistics, select
from tests.kernels.ahead import Build
from tests.kernels.builds import (
    max_pool as max_pool_builds,
    norm_act as norm_act_builds,
    norm_gradients as norm_gradients_builds,
    norm_statistics as norm_statistics_builds,
    select_passes as select_builds,
)

EPSILON = 1e-5
SUMMED = 2e-5  # between two orders of float32 sums
VIEWS = 128


class Drawn:
    """Random numbers where the work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def rows(self, *shape: int) -> Tensor:
        """Return float32."""
        return torch.randn(shape, generator=self._generator, device=self._device)

    def images(self, *shape: int) -> Tensor:
        """Return [N, C, H, W] of the type of activations, whose sums are not near zero."""
        kind = number_type(self._device)
        return (self.rows(*shape) + 1.0).to(kind, memory_format=torch.channels_last)

    def norm(self, channels: int) -> tuple[Tensor, ...]:
        """Return mean, variance, weight and bias [C]."""
        mean, weight, bias, spread = (self.rows(channels) for _ in range(4))
        return mean, 0.5 + spread.square(), weight, bias


# --- batch norm ----------------------------------------------------------------------------------


def batch_norm(
    device: torch.device,
    images: int,
    channels: int,
    side: int,
    last: bool,  # noqa: FBT001 - part of a size
    *,
    way: str,
) -> Callable[[norm_statistics.Tiles], Work]:
    """Return one pass; in the last layer of a block a residual is added."""
    drawn = Drawn(device)
    inputs, gradient = (drawn.images(images, channels, side, side) for _ in range(2))
    residual = drawn.images(images, channels, side, side) if last else None
    norm = drawn.norm(channels)
    ways = {"epsilon": EPSILON, "relu": True}
    outputs = norm_act.normalise(inputs, norm, residual, **ways) if last else None
    known = gradient, inputs, outputs, norm
    totals, gated = norm_gradients.sum_gradients(*known, **ways)

    def measure(tiles: norm_statistics.Tiles) -> tuple[Tensor, ...]:
        return norm_statistics.batch_statistics(inputs, tiles)

    def apply(tiles: norm_statistics.Tiles) -> tuple[Tensor, ...]:
        return (norm_act.normalise(inputs, norm, residual, tiles=tiles, **ways),)

    def reduce(tiles: norm_statistics.Tiles) -> tuple[Tensor, ...]:
        sums, through = norm_gradients.sum_gradients(*known, tiles=tiles, **ways)
        return (sums, through) if last else (sums,)

    def differentiate(tiles: norm_statistics.Tiles) -> tuple[Tensor, ...]:
        found = norm_gradients.differentiate_inputs(
            gated, inputs, norm, totals, ranks=1, tiles=tiles, epsilon=EPSILON, relu=not last
        )
        return (found,)

    chosen = {"measure": measure, "apply": apply, "reduce": reduce, "differentiate": differentiate}
    return lambda tiles: partial(chosen[way], tiles)


LAYERS = {
    "112x112x64": (VIEWS, 64, 112, False),
    "56x56x64": (VIEWS, 64, 56, False),
    "56x56x256 + residual": (VIEWS, 256, 56, True),
    "28x28x512 + residual": (VIEWS, 512, 28, True),
    "14x14x256": (VIEWS, 256, 14, False),
    "14x14x1024 + residual": (VIEWS, 1024, 14, True),
    "7x7x2048 + residual": (VIEWS, 2048, 7, True),
}


def heaviest(way: str, tiles: norm_statistics.Tiles) -> tuple[str, Build]:
    """Return the module and the build with all that a kernel can be given."""
    if way == "measure":
        return "norm_statistics", norm_statistics_builds.measure("bf16", tiles)
    if way == "apply":
        return "norm_act", norm_act_builds.forward("bf16", tiles)[0]
    builds = norm_gradients_builds.backward("bf16", **{way: tiles})
    return "norm_gradients", next(build for build in builds if build.kernel == way)


def norm_cases() -> Iterator[Case]:
    each = [{}, {"values": 1024}, {"values": 4096}, {"values": 4096, "warps": 8}, {"warps": 8},
            {"columns": 32}, {"columns": 128}, {"values": 8192, "warps": 8}]  # fmt: skip
    summed = [{}, {"values": 1024}, {"values": 4096, "warps": 8}, {"warps": 8}, {"columns": 128},
              {"programs": 264}, {"programs": 396}]  # fmt: skip
    for way, chosen, changes, tolerance in (
        ("measure", norm_statistics.MEASURE, [*summed, {"stages": 3}, {"stages": 6}], SUMMED),
        ("apply", norm_act.APPLY, each, BF16_ROUNDING),
        ("reduce", norm_gradients.REDUCE, [*summed, {"stages": 2}, {"stages": 4}], SUMMED),
        ("differentiate", norm_gradients.DIFFERENTIATE, each, BF16_ROUNDING),
    ):
        every = [replace(chosen, **change) for change in changes]
        yield Case(
            "norm_act",
            way,
            tuple(Candidate(tiles, asdict(tiles), (heaviest(way, tiles),)) for tiles in every),
            partial(batch_norm, way=way),
            LAYERS,
            tolerance,
        )


# --- selective kernels ---------------------------------------------------------------------------


def streams(
    device: torch.device, images: int, features: int, side: int, *, way: str
) -> Callable[[select.Tiles], Work]:
    """Return one pass over the two streams of an image."""
    drawn = Drawn(device)
    inputs = drawn.images(images, 2 * features, side, side)
    gradient = drawn.images(images, features, side, side)
    kept = (inputs, *drawn.norm(2 * features))
    chosen, everywhere = (drawn.rows(images, 2 * features) for _ in range(2))
    totals = drawn.rows(2, 2 * features)
    given = kept, gradient, chosen, everywhere / side**2, totals
    passes: dict[str, Callable[[select.Tiles], Tensor]] = {
        "pool": lambda tiles: select.sum_streams(kept, epsilon=EPSILON, tiles=tiles),
        "mix": lambda tiles: select.mix_streams(kept, chosen, epsilon=EPSILON, tiles=tiles),
        "mix_backward": lambda tiles: select.sum_gradients(
            kept, gradient, epsilon=EPSILON, tiles=tiles
        ),
        "pool_backward": lambda tiles: select.differentiate_inputs(
            *given, epsilon=EPSILON, ranks=1, tiles=tiles
        ),
    }

    def work(tiles: select.Tiles) -> Work:
        return lambda: (passes[way](tiles),)

    return work


GROUPS = {
    f"{name}: {side}x{side}x{features}": (VIEWS, features, side)
    for name, groups in {
        "R50 1x SK": ((64, 56), (256, 14), (512, 7)),
        "R152 3x SK": ((192, 56), (768, 14), (1536, 7)),
    }.items()
    for features, side in groups
}


def select_cases() -> Iterator[Case]:
    changes = [{}, {"stages": 2}, {"stages": 4}, {"positions": 16},
               {"positions": 64, "warps": 8}, {"positions": 16, "features": 128},
               {"programs": 1024}, {"programs": 4096}]  # fmt: skip
    for way, chosen, tolerance in (
        ("pool", select.POOL, SUMMED),
        ("mix", select.MIX, BF16_ROUNDING),
        ("mix_backward", select.MIX_BACKWARD, SUMMED),
        ("pool_backward", select.POOL_BACKWARD, BF16_ROUNDING),
    ):
        every = [replace(chosen, **change) for change in changes]
        yield Case(
            "select",
            way,
            tuple(
                Candidate(
                    tiles,
                    asdict(tiles),
                    (("select_passes", select_builds.one_pass(way, "*bf16", tiles)),),
                )
                for tiles in every
            ),
            partial(streams, way=way),
            GROUPS,
            tolerance,
        )


# --- max-pool ------------------------------------------------------------------------------------


def pooling(
    device: torch.device, images: int, channels: int, side: int, *, backward: bool
) -> Callable[[max_pool.Tiles], Work]:
    """Return one pass over what batch norm and ReLU give."""
    inputs = Drawn(device).images(images, channels, side, side).relu()
    outputs, taps = max_pool.take_largest(inputs, remembers=True)
    assert taps is not None

    def forward(tiles: max_pool.Tiles) -> tuple[Tensor, ...]:
        return tuple(
            tensor
            for tensor in max_pool.take_largest(inputs, remembers=True, tiles=tiles)
            if tensor is not None
        )

    def differentiate(tiles: max_pool.Tiles) -> tuple[Tensor, ...]:
        return (max_pool.differentiate_inputs(outputs, taps, (side, side), tiles=tiles),)

    return lambda tiles: partial(differentiate if backward else forward, tiles)


STEMS = {"112x112x64": (VIEWS, 64, 112), "112x112x192": (VIEWS, 192, 112)}


def pool_cases() -> Iterator[Case]:
    changes = [{}, {"rows": 4}, {"rows": 14}, {"rows": 28}, {"columns": 4, "warps": 1},
               {"columns": 16, "warps": 4}, {"warps": 1}, {"rows": 4, "columns": 16, "warps": 4},
               {"columns": 4, "channels": 128}]  # fmt: skip
    for way, chosen, build in (
        ("forward", max_pool.FORWARD, max_pool_builds.forward),
        ("backward", max_pool.BACKWARD, max_pool_builds.backward),
    ):
        every = [replace(chosen, **change) for change in changes]
        yield Case(
            "max_pool",
            way,
            tuple(
                Candidate(tiles, asdict(tiles), (("max_pool", build("bf16", tiles)),))
                for tiles in every
            ),
            partial(pooling, backward=way == "backward"),
            STEMS,
            0.0,
        )
