"""Builds of the fused batch norm: every tensor in 16 or in 32 bits, wide and narrow."""

from bigsimclr.kernels.norm_act import APPLY
from bigsimclr.kernels.norm_statistics import Tiles
from tests.kernels.ahead import Build

WIDTHS = (256, 8)  # channels: wide and narrow tiles
TYPES = ("bf16", "fp32")
CHANNELS = {"mean": "*fp32", "variance": "*fp32", "weight": "*fp32"}
SIZE = {"rows": "i32", "channels": "i32"}
BIAS = {"bias": "*fp32"}


def absent(*names: str) -> dict[str, object]:
    return dict.fromkeys(names)


def of_tiles(
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, object],
    tiles: Tiles,
) -> list[Build]:
    """Build one kernel for wide and narrow matrices."""
    stages = {"STAGES": tiles.stages} if kernel == "reduce" else {}
    found = []
    for width in WIDTHS:
        columns = min(tiles.columns, width)
        sides = {"ROWS": tiles.values // columns, "COLUMNS": columns}
        aligned = ("channels",) if width % 16 == 0 else ()
        found.append(
            Build(
                kernel,
                signature | SIZE,
                {**sides, **stages, **constants},
                warps=tiles.warps,
                aligned=aligned,
            )
        )
    return found


def forward(kind: str, tiles: Tiles = APPLY) -> list[Build]:
    tensors = {"inputs": f"*{kind}", "outputs": f"*{kind}", **CHANNELS, "epsilon": "fp32"}
    residual = {"residual": f"*{kind}"}
    return [
        *of_tiles("apply", tensors | BIAS | residual, {"RELU": True}, tiles),
        *of_tiles("apply", tensors | BIAS, {"RELU": True, **absent("residual")}, tiles),
        *of_tiles("apply", tensors | BIAS, {"RELU": False, **absent("residual")}, tiles),
        *of_tiles("apply", tensors, {"RELU": False, **absent("bias", "residual")}, tiles),
    ]


BUILDS = [build for kind in TYPES for build in forward(kind)]
