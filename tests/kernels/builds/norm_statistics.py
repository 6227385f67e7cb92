"""Builds of batch statistics: of tensors in 16 and in 32 bits, wide and narrow."""

from tests.kernels.ahead import Build

TILE, JOINED = 2048, 4096
SIZE = {"rows": "i32", "channels": "i32", "programs": "i32"}
PARTIAL = {"means": "*fp32", "squares": "*fp32"}

BUILDS = [
    *(
        Build(
            "measure",
            {"inputs": f"*{kind}", **PARTIAL, **SIZE},
            {"ROWS": TILE // columns, "COLUMNS": columns},
            aligned=aligned,
        )
        for kind in ("bf16", "fp32")
        for columns, aligned in ((64, ("channels",)), (8, ()))
    ),
    *(
        Build(
            "merge",
            {**PARTIAL, "mean": "*fp32", "variance": "*fp32", **SIZE},
            {"ROWS": 32, "PARTS": parts, "COLUMNS": JOINED // parts},
            warps=8,
            aligned=("channels",),
        )
        for parts in (512, 64, 1)
    ),
]
