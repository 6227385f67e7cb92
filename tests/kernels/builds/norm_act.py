"""Builds of the fused batch norm: every tensor in 16 or in 32 bits, wide and narrow."""

from tests.kernels.ahead import Build

TILE = 2048
COLUMNS = (64, 8)
TYPES = ("bf16", "fp32")
CHANNELS = {"mean": "*fp32", "variance": "*fp32", "weight": "*fp32"}
SIZE = {"rows": "i32", "channels": "i32"}
BIAS = {"bias": "*fp32"}


def absent(*names: str) -> dict[str, object]:
    return dict.fromkeys(names)


def of_tiles(kernel: str, signature: dict[str, str], constants: dict[str, object]) -> list[Build]:
    """Build one kernel for wide and narrow matrices."""
    return [
        Build(
            kernel,
            signature | SIZE,
            {"ROWS": TILE // columns, "COLUMNS": columns, **constants},
            aligned=("channels",) if columns == max(COLUMNS) else (),
        )
        for columns in COLUMNS
    ]


def forward(kind: str) -> list[Build]:
    tensors = {"inputs": f"*{kind}", "outputs": f"*{kind}", **CHANNELS, "epsilon": "fp32"}
    residual = {"residual": f"*{kind}"}
    return [
        *of_tiles("apply", tensors | BIAS | residual, {"RELU": True}),
        *of_tiles("apply", tensors | BIAS, {"RELU": True, **absent("residual")}),
        *of_tiles("apply", tensors | BIAS, {"RELU": False, **absent("residual")}),
        *of_tiles("apply", tensors, {"RELU": False, **absent("bias", "residual")}),
    ]


def backward(kind: str) -> list[Build]:
    tensors = {"gradient": f"*{kind}", "inputs": f"*{kind}", **CHANNELS, "epsilon": "fp32"}
    outputs = {"outputs": f"*{kind}"}
    summed = tensors | {"sums": "*fp32", "programs": "i32"}
    made = tensors | {"totals": "*fp32", "share": "fp32", "input_gradient": f"*{kind}"}
    residual = {"residual_gradient": f"*{kind}"}
    lone = absent("residual_gradient")
    return [
        *of_tiles("reduce", summed | BIAS | outputs, {"RELU": True}),
        *of_tiles("reduce", summed | BIAS, {"RELU": True, **absent("outputs")}),
        *of_tiles("reduce", summed | BIAS, {"RELU": False, **absent("outputs")}),
        *of_tiles("reduce", summed, {"RELU": False, **absent("bias", "outputs")}),
        *of_tiles("differentiate", made | BIAS | outputs | residual, {"RELU": True}),
        *of_tiles("differentiate", made | BIAS, {"RELU": True, **absent("outputs"), **lone}),
        *of_tiles("differentiate", made | BIAS, {"RELU": False, **absent("outputs"), **lone}),
        *of_tiles("differentiate", made, {"RELU": False, **absent("bias", "outputs"), **lone}),
    ]


BUILDS = [build for kind in TYPES for build in (*forward(kind), *backward(kind))]
