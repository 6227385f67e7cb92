"""At 224 and 32 pixels, as launched for views of float32 and bf16."""

from bigsimclr.kernels.distort import TILES, Tiles
from tests.kernels.ahead import Build

STRIDES = {
    "view_stride": "i32",
    "image_stride": "i32",
    "channel_stride": "i32",
    "row_stride": "i32",
}
ALIGNED = ("view_stride", "image_stride", "channel_stride", "row_stride")


def sum_up(size: int, *, tiles: Tiles = TILES) -> Build:
    return _build("_sum_up", size, {"sums": "*fp32"}, {}, tiles)


def colour(size: int, kind: str, *, softens: bool, tiles: Tiles = TILES) -> Build:
    results = {
        "sums": "*fp32",
        "coloured": "*fp32" if softens else f"*{kind}",
        "found": f"*{kind}",
    }
    return _build("_colour", size, results, {"SOFTENS": softens}, tiles)


def _build(
    kernel: str, size: int, results: dict[str, str], constants: dict[str, bool], tiles: Tiles
) -> Build:
    block = min(1 << (size * size - 1).bit_length(), 32 * tiles.warps * tiles.pixels)
    return Build(
        kernel,
        {"crops": "*fp32", "decisions": "*fp32", **results, "images": "i32", **STRIDES},
        {
            "column_stride": 1,
            "HEIGHT": size,
            "WIDTH": size,
            "FLAT": True,
            "BLOCK": block,
            "BLOCKS": tiles.blocks,
            **constants,
        },
        warps=block // (32 * tiles.pixels),
        stages=1,
        aligned=ALIGNED,
    )


BUILDS = [
    sum_up(224),
    sum_up(32),
    *(
        build
        for kind in ("fp32", "bf16")
        for build in (
            colour(224, kind, softens=True),
            colour(224, kind, softens=False),
            colour(32, kind, softens=True),
        )
    ),
]
