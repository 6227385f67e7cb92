"""Networks by short names, as benchmarks take them: `r50-1x`, `r152-3x-sk`, `r18-cifar`."""

import re
from typing import Final

from bigsimclr.models import Architecture
from bigsimclr.models.anatomy import DEPTHS
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone

TABLE_1: Final = (
    *(
        f"r{depth}-{width}x{kind}"
        for depth in (50, 101)
        for width in (1, 2)
        for kind in ("", "-sk")
    ),
    *("r152-1x", "r152-1x-sk", "r152-2x", "r152-2x-sk", "r152-3x-sk"),
)
"""The networks of Table 1 of arXiv 2006.10029, in its order."""

_NAME: Final = re.compile(r"r(\d+)(?:-(\d+(?:\.\d+)?)x)?(-sk)?(-cifar)?")


def network(name: str) -> Architecture:
    """Return the network that a short name describes, with the head of pretraining.

    A name is `r<depth>`, then optionally `-<width>x`, `-sk` for selective kernels and `-cifar` for
    the stem of small images.

    Raises:
        ValueError: the name describes no network.
    """
    found = _NAME.fullmatch(name)
    if found is None or int(found[1]) not in DEPTHS:
        raise ValueError(f"{name!r} is no network; write r50-1x, r152-3x-sk or r18-cifar")
    section = {
        "kind": "resnet",
        "depth": int(found[1]),
        "width": float(found[2] or 1),
        "selective_kernel": found[3] is not None,
        "stem": "cifar" if found[4] else "imagenet",
    }
    backbone = ResNetBackbone.model_validate(section)
    return Architecture(backbone, HeadSection(), classes=None, from_layer=0)
