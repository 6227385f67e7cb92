"""Builds of the fused batch norm: every tensor in 16 or in 32 bits, wide and narrow."""

from bigsimclr.kernels.norm_act import APPLY, DIFFERENTIATE, REDUCE
from bigsimclr.kernels.norm_statistics import Tiles
from tests.kernels.ahead import Build

CHOSEN = {"apply": APPLY, "reduce": REDUCE, "differentiate": DIFFERENTIATE}
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
    given: dict[str, Tiles],
) -> list[Build]:
    """Build one kernel for wide and narrow matrices, with the tiles that are given or chosen."""
    tiles = given.get(kernel, CHOSEN[kernel])
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


def forward(kind: str, tiles: dict[str, Tiles]) -> list[Build]:
    tensors = {"inputs": f"*{kind}", "outputs": f"*{kind}", **CHANNELS, "epsilon": "fp32"}
    residual = {"residual": f"*{kind}"}
    return [
        *of_tiles("apply", tensors | BIAS | residual, {"RELU": True}, tiles),
        *of_tiles("apply", tensors | BIAS, {"RELU": True, **absent("residual")}, tiles),
        *of_tiles("apply", tensors | BIAS, {"RELU": False, **absent("residual")}, tiles),
        *of_tiles("apply", tensors, {"RELU": False, **absent("bias", "residual")}, tiles),
    ]


def backward(kind: str, tiles: dict[str, Tiles]) -> list[Build]:
    tensors = {"gradient": f"*{kind}", "inputs": f"*{kind}", **CHANNELS, "epsilon": "fp32"}
    outputs = {"outputs": f"*{kind}"}
    summed = tensors | {"sums": "*fp32", "programs": "i32"}
    made = tensors | {"totals": "*fp32", "share": "fp32", "input_gradient": f"*{kind}"}
    residual = {"residual_gradient": f"*{kind}"}
    bare = absent("outputs")
    alone = bare | absent("residual_gradient")
    return [
        *of_tiles("reduce", summed | BIAS | outputs, {"RELU": True}, tiles),
        *of_tiles("reduce", summed | BIAS, {"RELU": True, **bare}, tiles),
        *of_tiles("reduce", summed | BIAS, {"RELU": False, **bare}, tiles),
        *of_tiles("reduce", summed, {"RELU": False, **bare, **absent("bias")}, tiles),
        *of_tiles("differentiate", made | BIAS | outputs | residual, {"RELU": True}, tiles),
        *of_tiles("differentiate", made | BIAS, {"RELU": True, **alone}, tiles),
        *of_tiles("differentiate", made | BIAS, {"RELU": False, **alone}, tiles),
        *of_tiles("differentiate", made, {"RELU": False, **alone, **absent("bias")}, tiles),
    ]


BUILDS = [build for kind in TYPES for build in (*forward(kind, {}), *backward(kind, {}))]
