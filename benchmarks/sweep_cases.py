"""What `benchmarks.sweep` sweeps: kernels, their candidates, and the work that is timed.

The first candidate of a case is what the kernels choose now. Work is done in bf16 where a run does
it in bf16, on a GPU; on a CPU, which only the tests do, in float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.augment import RADIUS, SIZE, draw
from benchmarks.loss import WIDTH, inputs
from benchmarks.networks import network
from bigsimclr.kernels import distort, lars, nt_xent
from bigsimclr.kernels.lars_update import LarsUpdate
from bigsimclr.models import build_model
from bigsimclr.world import ALONE
from tests.kernels.ahead import Build
from tests.kernels.builds import (
    colour as colour_builds,
    lars as lars_builds,
    nt_xent as nt_xent_builds,
    soften as soften_builds,
)

TEMPERATURE: Final = 0.1
RATE: Final = 0.1
BF16_ROUNDING: Final = 2.0**-7  # from a value to the next, over the value

Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """Tiles, warps and stages that a kernel may be given."""

    tiles: object
    facts: dict[str, int]  # what they are
    builds: tuple[tuple[str, Build], ...]  # modules of `bigsimclr.kernels`, and what of them


@dataclass(frozen=True)
class Case:
    """A kernel in one of its modes."""

    kernel: str
    mode: str
    candidates: tuple[Candidate, ...]
    # Device and size -> tiles -> what is timed; it returns what is compared.
    prepare: Callable[..., Callable[..., Work]]
    sizes: dict[str, tuple[object, ...]]  # by their names
    tolerance: float  # between two candidates, of the largest value

    @property
    def name(self) -> str:
        """Return what no other case is called."""
        return f"{self.kernel}, {self.mode}"


def number_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- NT-Xent -------------------------------------------------------------------------------------


def loss(
    device: torch.device, views: int, *, grade: nt_xent.Grade, backward: bool
) -> Callable[[nt_xent.Cut], Work]:
    """Return the forward pass, or both passes; a backward pass is not without the other."""
    first, second = inputs(views // 2, device)

    def given(cut: nt_xent.Cut) -> Work:
        def value() -> Tensor:
            return nt_xent.fused_nt_xent(
                first, second, None, temperature=TEMPERATURE, grade=grade, world=ALONE, cut=cut
            )

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(value(), (first, second))

        return both if backward else lambda: (value().detach(),)

    return given


def loss_cases() -> Iterator[Case]:
    # Side, warps, stages, programs of a launch; symmetric, the tiles of the sums are square.
    of_sums = {
        "bf16": [(128, 4, 2, 264), (128, 4, 3, 132), (128, 8, 2, 264), (128, 8, 3, 132),
                 (128, 4, 2, 528), (64, 4, 3, 396), (64, 4, 2, 528)],
        "fp32": [(64, 4, 2, 264), (64, 4, 1, 396), (64, 4, 2, 528), (128, 8, 1, 132),
                 (128, 8, 2, 132)],
    }  # fmt: skip
    # Rows, columns, warps, stages, programs of a launch.
    of_slope = {
        "bf16": [(64, 64, 4, 2, 396), (64, 64, 4, 3, 396), (64, 64, 4, 2, 264), (64, 64, 4, 2, 528),
                 (64, 128, 4, 2, 264), (128, 64, 8, 2, 132), (128, 64, 8, 3, 132),
                 (64, 32, 4, 3, 396)],
        "fp32": [(64, 32, 4, 2, 396), (64, 32, 4, 1, 396), (64, 32, 4, 3, 264), (64, 64, 4, 1, 264),
                 (64, 64, 4, 2, 264), (128, 32, 8, 2, 132)],
    }  # fmt: skip
    sizes = {f"{views} views": (views,) for views in (512, 8192, 65536)}
    for grade, found in of_sums.items():
        split = grade == "fp32"
        slope = nt_xent.slope_tiles(WIDTH, split=split)
        every = []
        for side, warps, stages, programs in found:
            tiles = nt_xent.Tiles(side, side, warps, stages)
            build = nt_xent_builds.sums(WIDTH, split=split, tiles=tiles)
            cut = nt_xent.Cut(tiles, slope, summing=programs)
            facts = {**asdict(tiles), "programs": programs}
            every.append(Candidate(cut, facts, (("nt_xent", build),)))
        yield Case(
            "nt_xent sums",
            grade,
            tuple(every),
            partial(loss, grade=grade, backward=False),
            sizes,
            2e-6 if split else 1e-4,
        )
    for grade, found in of_slope.items():
        split = grade == "fp32"
        sums = nt_xent.sum_tiles(WIDTH, split=split, hopper=True)
        every = []
        for *sides, programs in found:
            tiles = nt_xent.Tiles(*sides)
            build = nt_xent_builds.slope(WIDTH, split=split, tiles=tiles)
            cut = nt_xent.Cut(sums, tiles, sloping=programs)
            facts = {**asdict(tiles), "programs": programs}
            every.append(Candidate(cut, facts, (("nt_xent", build),)))
        yield Case(
            "nt_xent slope",
            grade,
            tuple(every),
            partial(loss, grade=grade, backward=True),
            sizes,
            1e-5 if split else 2e-3,
        )


# --- LARS ----------------------------------------------------------------------------------------


def shapes_of(name: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [parameter.shape for parameter in build_model(network(name), seed=0).parameters()]


def update(device: torch.device, name: str) -> Callable[[lars.Tiles], Work]:
    """Return an update of all parameters of a network, with bf16 copies of them."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: torch.Size, scale: float) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, device=device)
        last = torch.channels_last if values.ndim == 4 else torch.contiguous_format
        return values.contiguous(memory_format=last)

    shapes = shapes_of(name)
    initial = [drawn(shape, 1.0) for shape in shapes]
    gradients = [drawn(shape, 1e-2) for shape in shapes]
    weights, momenta = ([torch.empty_like(tensor) for tensor in initial] for _ in range(2))
    working = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in initial]
    rates = [torch.tensor(RATE, device=device)] * len(shapes)

    def given(tiles: lars.Tiles) -> Work:
        for weight, momentum, start in zip(weights, momenta, initial, strict=True):
            weight.copy_(start)
            momentum.zero_()
        adapts = [len(shape) > 1 for shape in shapes]
        made = LarsUpdate(
            weights,
            weight_decays=[1e-4 * adapt for adapt in adapts],
            adapts=adapts,
            momentum=0.9,
            trust_coefficient=1e-3,
            tiles=tiles,
        )

        def work() -> tuple[Tensor, ...]:
            made.update(
                weights=weights,
                gradients=gradients,
                momenta=momenta,
                rates=rates,
                working=working,
            )
            return (*weights, *momenta)

        return work

    return given


def update_case() -> Case:
    found = [(2048, 8), (1024, 4), (1024, 8), (2048, 4), (2048, 16), (4096, 8), (4096, 16)]
    every = []
    for chunk, warps in found:
        tiles = replace(lars.TILES, chunk=chunk, warps=warps)
        builds = tuple(
            ("lars", lars_builds.of_chunks(kernel, tiles=tiles)) for kernel in ("square", "move")
        )
        every.append(Candidate(tiles, asdict(tiles), builds))
    names = ("r50-1x", "r152-3x-sk")
    return Case(
        "lars", "with bf16 copies", tuple(every), update, {name: (name,) for name in names}, 1e-6
    )


# --- views ---------------------------------------------------------------------------------------


def views(device: torch.device, images: int, size: int) -> Callable[[distort.Tiles], Work]:
    """Return all launches on two views of some images."""
    draws = draw(images, size)
    decisions = distort.pack(
        flip=draws.flip,
        jitter=draws.jitter,
        order=draws.order,
        factors=draws.factors,
        grey=draws.grey,
        blur=draws.blur,
        sigma=draws.sigma,
    )
    packed = torch.from_numpy(np.ascontiguousarray(decisions)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    crops = torch.rand(2, images, 3, size, size, generator=generator, device=device)
    kind = number_type(device)

    def given(tiles: distort.Tiles) -> Work:
        return lambda: (
            distort.distort(crops, packed, radius=RADIUS * size // SIZE, dtype=kind, tiles=tiles),
        )

    return given


def view_cases() -> Iterator[Case]:
    colours = [{}, {"pixels": 2}, {"pixels": 8}, {"warps": 16}, {"warps": 4}, {"blocks": 4}]
    blurs = [{}, {"blur_values": 10752}, {"blur_values": 43008},
             {"blur_block": 512, "blur_warps": 4}, {"blur_block": 2048},
             {"blur_block": 2048, "blur_warps": 16}, {"blur_warps": 4}]  # fmt: skip

    def colour(tiles: distort.Tiles) -> Build:
        return colour_builds.colour(SIZE, "bf16", softens=True, tiles=tiles)

    def blur(tiles: distort.Tiles) -> Build:
        return soften_builds.soften(SIZE, "bf16", radius=RADIUS, tiles=tiles)

    cases = (("colours", "colour", colours, colour), ("blur", "soften", blurs, blur))
    for name, module, changes, build in cases:
        every = [replace(distort.TILES, **change) for change in changes]
        yield Case(
            "distort",
            name,
            tuple(Candidate(tiles, asdict(tiles), ((module, build(tiles)),)) for tiles in every),
            views,
            {f"256 images of {SIZE} px": (256, SIZE)},
            BF16_ROUNDING,
        )
