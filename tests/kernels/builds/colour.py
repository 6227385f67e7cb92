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


def colour(size: int, kind: str, *, softens: bool, tiles: Tiles = TILES) -> Build:
    block = min(1 << (size * size - 1).bit_length(), 32 * tiles.warps * tiles.pixels)
    return Build(
        "_colour",
        {
            "crops": "*fp32",
            "decisions": "*fp32",
            "coloured": "*fp32" if softens else f"*{kind}",
            "found": f"*{kind}",
            "images": "i32",
            **STRIDES,
        },
        {
            "column_stride": 1,
            "HEIGHT": size,
            "WIDTH": size,
            "FLAT": True,
            "SOFTENS": softens,
            "BLOCK": block,
        },
        warps=block // (32 * tiles.pixels),
        stages=1,
        aligned=ALIGNED,
    )


BUILDS = [
    build
    for kind in ("fp32", "bf16")
    for build in (
        colour(224, kind, softens=True),
        colour(224, kind, softens=False),
        colour(32, kind, softens=True),
    )
]
