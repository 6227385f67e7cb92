"""Builds of the fused batch norm's gradient: every tensor in 16 or in 32 bits, wide and narrow."""

from bigsimclr.kernels.norm_gradients import DIFFERENTIATE, REDUCE
from bigsimclr.kernels.norm_statistics import JOINED, JOINING_WARPS, Tiles
from tests.kernels.ahead import Build
from tests.kernels.builds.norm_act import BIAS, CHANNELS, TYPES, absent, of_tiles


def backward(
    kind: str, *, reduce: Tiles = REDUCE, differentiate: Tiles = DIFFERENTIATE
) -> list[Build]:
    tensors = {"gradient": f"*{kind}", "inputs": f"*{kind}", **CHANNELS, "epsilon": "fp32"}
    summed = tensors | {"sums": "*fp32", "programs": "i32"}
    known = {"outputs": f"*{kind}", "gated": f"*{kind}"}
    unknown = absent(*known)
    made = tensors | {"totals": "*fp32", "share": "fp32", "input_gradient": f"*{kind}"}
    return [
        *of_tiles("reduce", summed | BIAS | known, {"RELU": True}, reduce),
        *of_tiles("reduce", summed | BIAS, {"RELU": True, **unknown}, reduce),
        *of_tiles("reduce", summed | BIAS, {"RELU": False, **unknown}, reduce),
        *of_tiles("reduce", summed, {"RELU": False, **unknown, **absent("bias")}, reduce),
        *of_tiles("differentiate", made | BIAS, {"RELU": True}, differentiate),
        *of_tiles("differentiate", made | BIAS, {"RELU": False}, differentiate),
        *of_tiles("differentiate", made, {"RELU": False, **absent("bias")}, differentiate),
    ]


BUILDS = [
    *(build for kind in TYPES for build in backward(kind)),
    *(
        Build(
            "join",
            {"parts": "*fp32", "sums": "*fp32", "columns": "i32", "programs": "i32"},
            {"PARTS": parts, "COLUMNS": JOINED // parts},
            warps=JOINING_WARPS,
            aligned=("columns",),
        )
        for parts in (512, 64, 1)
    ),
]
