"""At 224 and 32 pixels, as launched for views of float32 and bf16."""

from bigsimclr.kernels.distort import TILES, Tiles
from tests.kernels.ahead import Build


def soften(size: int, kind: str, *, radius: int, tiles: Tiles = TILES) -> Build:
    return Build(
        "_soften",
        {
            "coloured": "*fp32",
            "weights": "*fp32",
            "between": "*fp32",
            "found": f"*{kind}",
            "decisions": "*fp32",
        },
        {
            "HEIGHT": size,
            "WIDTH": size,
            "RADIUS": radius,
            "ROWS": min(tiles.blur_values // (3 * size) // 4 * 4, size),
            "GAP": -(-3 * radius // 4) * 4,
            "TAPS": 1 << (2 * radius).bit_length(),
            "BLOCK": tiles.blur_block,
        },
        warps=tiles.blur_warps,
        stages=1,
    )


BUILDS = [
    soften(size, kind, radius=radius)
    for kind in ("fp32", "bf16")
    for size, radius in ((224, 11), (32, 1))
]
