"""Crops to 224 and 32 pixels, of bytes and float32, one channel or one pixel after the other."""

from bigsimclr.kernels.crop import TILE
from tests.kernels.ahead import Build


def crop(size: int, kind: str, *, interleaved: bool, narrow: bool = False) -> Build:
    strides = ("image_stride", "row_stride") + ("channel_stride",) * (not interleaved)
    return Build(
        "_crop",
        {
            "pixels": f"*{kind}",
            "places": "*i32",
            "down": "*fp32",
            "across": "*fp32",
            "found": "*fp32",
            "images": "i32",
            "views": "i32",
            **dict.fromkeys(strides, "i32"),
        },
        {
            **({"channel_stride": 1} if interleaved else {}),
            "COLUMN_STRIDE": 3 if interleaved else 1,
            "HEIGHT": size,
            "WIDTH": size,
            "NARROW": narrow,
            "ROWS": TILE.rows,
            "COLUMNS": TILE.columns,
        },
        warps=TILE.warps,
        stages=1,
    )


BUILDS = [
    *(
        crop(size, kind, interleaved=interleaved)
        for size in (224, 32)
        for kind in ("u8", "fp32")
        for interleaved in (False, True)
    ),
    crop(32, "u8", interleaved=True, narrow=True),
]
