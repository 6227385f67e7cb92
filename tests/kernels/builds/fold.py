"""Folding of float32 and bf16 views of 224 pixels, and of images as a decoder leaves them."""

from bigsimclr.kernels.fold import FOLD, FOLDED
from tests.kernels.ahead import Build

SIZES = ["height", "width", "down", "across"]
STRIDES = ["image_stride", "colour_stride", "row_stride", "column_stride"]


def fold(kind: str, *, front: int) -> Build:
    return Build(
        "fold",
        {"images": kind, "folded": "*bf16"} | dict.fromkeys(SIZES + STRIDES, "i32"),
        {"FRONT": front, "POSITIONS": FOLD.positions, "CHANNELS": FOLDED},
        warps=FOLD.warps,
    )


BUILDS = [fold(kind, front=front) for kind in ("*fp32", "*bf16") for front in (1, 2)]
