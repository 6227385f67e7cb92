"""Builds of batch statistics: of tensors in 16 and in 32 bits, wide and narrow."""

from bigsimclr.kernels.norm_statistics import MEASURE, Tiles
from tests.kernels.ahead import Build

JOINED = 4096
SIZE = {"rows": "i32", "channels": "i32", "programs": "i32"}
PARTIAL = {"means": "*fp32", "squares": "*fp32"}


def measure(kind: str, tiles: Tiles = MEASURE, *, channels: int = 256) -> Build:
    """Build it for inputs of a type; few channels make narrow tiles."""
    columns = min(tiles.columns, channels)
    return Build(
        "measure",
        {"inputs": f"*{kind}", **PARTIAL, **SIZE},
        {"ROWS": tiles.values // columns, "COLUMNS": columns, "STAGES": tiles.stages},
        warps=tiles.warps,
        aligned=("channels",) if channels % 16 == 0 else (),
    )


BUILDS = [
    *(measure(kind, channels=channels) for kind in ("bf16", "fp32") for channels in (256, 8)),
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
