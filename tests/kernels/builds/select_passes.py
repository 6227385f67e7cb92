"""The kernels of the selective-kernel block, in the types of a run."""

from bigsimclr.kernels.select import POOL, Tiles
from tests.kernels.ahead import Build

KEPT = {"mean": "*fp32", "variance": "*fp32", "weight": "*fp32", "bias": "*fp32"}
SIZES = {"N": "i32", "P": "i32", "F": "i32", "parts": "i32", "tiles": "i32", "epsilon": "fp32"}
# Widths of features are multiples of 16: loads of a thread are then whole.
ALIGNED = ("F",)


KERNELS = ("pool", "mix", "mix_backward", "pool_backward")


def one_pass(kernel: str, streams: str, tiles: Tiles = POOL) -> Build:
    own = {
        "pool": {"sums": "*fp32"},
        "mix": {"chosen": "*fp32", "mixed": streams},
        "mix_backward": {"gradient": streams, "sums": "*fp32"},
        "pool_backward": {
            "gradient": streams,
            "chosen": "*fp32",
            "everywhere": "*fp32",
            "sums": "*fp32",
            "share": "fp32",
            "toward": streams,
        },
    }
    constants = {
        "POSITIONS": tiles.positions,
        "FEATURES": tiles.features,
        "STAGES": tiles.stages,
    }
    signature = {"inputs": streams} | KEPT | own[kernel] | SIZES
    return Build(kernel, signature, dict(constants), warps=tiles.warps, aligned=ALIGNED)


BUILDS = [
    one_pass(kernel, streams) for streams in ("*bf16", "*fp16", "*fp32") for kernel in KERNELS
]
