"""Builds of the max-pool: of 16 and 32 bits, wide and narrow, with and without a memory."""

from bigsimclr.kernels.max_pool import BACKWARD, FORWARD, Tiles
from tests.kernels.ahead import Build

WIDTHS = (64, 12)  # channels: whole and cut tiles
SIZE = {"height": "i32", "width": "i32", "channels": "i32"}


def one_pass(
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, object],
    tiles: Tiles,
    *,
    channels: int,
) -> Build:
    sides = {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "CHANNELS": min(tiles.channels, 1 << (channels - 1).bit_length()),
    }
    aligned = ("channels",) if channels % 16 == 0 else ()
    return Build(
        kernel, signature | SIZE, {**sides, **constants}, warps=tiles.warps, aligned=aligned
    )


def forward(
    kind: str, tiles: Tiles = FORWARD, *, channels: int = 64, remembers: bool = True
) -> Build:
    taps = {"taps": "*u8"} if remembers else {}
    tensors = {"inputs": f"*{kind}", "outputs": f"*{kind}", **taps}
    nothing: dict[str, object] = {} if remembers else {"taps": None}
    return one_pass("take_maxima", tensors, nothing, tiles, channels=channels)


def backward(kind: str, tiles: Tiles = BACKWARD, *, channels: int = 64) -> Build:
    tensors = {"gradient": f"*{kind}", "taps": "*u8", "input_gradient": f"*{kind}"}
    return one_pass("pass_gradients", tensors, {}, tiles, channels=channels)


BUILDS = [
    build
    for kind in ("bf16", "fp16", "fp32")
    for channels in WIDTHS
    for build in (
        forward(kind, channels=channels),
        forward(kind, channels=channels, remembers=False),
        backward(kind, channels=channels),
    )
]
