"""The kernels of the selective-kernel block, in the types of a run."""

from tests.kernels.ahead import Build

KEPT = {"mean": "*fp32", "variance": "*fp32", "weight": "*fp32", "bias": "*fp32"}
SIZES = {"N": "i32", "P": "i32", "F": "i32", "parts": "i32", "tiles": "i32", "epsilon": "fp32"}
# Widths of features are multiples of 16: loads of a thread are then whole.
ALIGNED = ("F",)


def builds(streams: str) -> list[Build]:
    return [
        Build(kernel, {"inputs": streams} | KEPT | own | SIZES, {}, aligned=ALIGNED)
        for kernel, own in {
            "_pool": {"sums": "*fp32"},
            "_mix": {"chosen": "*fp32", "mixed": streams},
            "_mix_backward": {"gradient": streams, "sums": "*fp32"},
            "_pool_backward": {
                "gradient": streams,
                "chosen": "*fp32",
                "everywhere": "*fp32",
                "sums": "*fp32",
                "share": "fp32",
                "toward": streams,
            },
        }.items()
    ]


BUILDS = [build for streams in ("*bf16", "*fp16", "*fp32") for build in builds(streams)]
