"""Builds of batch statistics: of tensors in 16 and in 32 bits, wide and narrow."""

from bigsimclr.kernels.norm_statistics import JOINED, JOINING_WARPS, MEASURE, Tiles
from tests.kernels.ahead import Build

SIZE = {"rows": "i32", "channels": "i32", "programs": "i32"}
PARTS = {"parts": "*fp32"}
RUNNING = ("running_mean", "running_variance")


def measure(kind: str, tiles: Tiles = MEASURE, *, channels: int = 256) -> Build:
    """Build it for inputs of a type; few channels make narrow tiles."""
    columns = min(tiles.columns, channels)
    return Build(
        "measure",
        {"inputs": f"*{kind}", **PARTS, **SIZE},
        {"ROWS": tiles.values // columns, "COLUMNS": columns, "STAGES": tiles.stages},
        warps=tiles.warps,
        aligned=("channels",) if channels % 16 == 0 else (),
    )


BUILDS = [
    *(measure(kind, channels=channels) for kind in ("bf16", "fp32") for channels in (256, 8)),
    *(
        Build(
            "merge",
            {**PARTS, "statistics": "*fp32", "momentum": "fp32", **SIZE, **moved},
            {"ROWS": 32, "PARTS": parts, "COLUMNS": JOINED // parts, **still},
            warps=JOINING_WARPS,
            aligned=("channels",),
        )
        for parts in (512, 64, 1)
        for moved, still in (
            (dict.fromkeys(RUNNING, "*fp32"), {}),
            ({}, dict.fromkeys(RUNNING)),
        )
    ),
]
