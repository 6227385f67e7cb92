"""The launches of LARS as runs make them: with and without Nesterov momentum, and not classic."""

from bigsimclr.kernels.lars import TILES, Tiles
from tests.kernels.ahead import Build

TABLES = {
    "table": "*i64",
    "owners": "*i32",
    "firsts": "*i32",
    "sizes": "*i64",
    "decays": "*fp32",
}
SHAPE = {"tensors": "i32", "chunks": "i32"}


OWN = {"square": {"adapts": "*i32", "sums": "*fp32"}, "move": {"factors": "*fp32"}}


def of_chunks(
    kernel: str, *, classic: bool = True, nesterov: bool = False, tiles: Tiles = TILES
) -> Build:
    constants: dict[str, object] = {"CLASSIC": classic, "NESTEROV": nesterov, "CHUNK": tiles.chunk}
    signature = TABLES | OWN[kernel] | SHAPE | {"momentum": "fp32"}
    return Build(kernel, signature, constants, warps=tiles.warps)


def of_tensors(*, sums: bool, factors: bool) -> Build:
    return Build(
        "scale",
        {
            "table": "*i64",
            "firsts": "*i32",
            "adapts": "*i32",
            "sums": "*fp32",
            "norms": "*fp32",
            "factors": "*fp32",
            **SHAPE,
            "trust_coefficient": "fp32",
        },
        {"SUMS": sums, "FACTORS": factors, "BLOCK": TILES.block},
    )


FORMS = [(True, False), (True, True), (False, False), (False, True)]
BUILDS = [
    *(of_chunks("square", classic=classic, nesterov=nesterov) for classic, nesterov in FORMS),
    of_tensors(sums=True, factors=True),
    of_tensors(sums=True, factors=False),
    of_tensors(sums=False, factors=True),
    *(of_chunks("move", classic=classic, nesterov=nesterov) for classic, nesterov in FORMS),
]
