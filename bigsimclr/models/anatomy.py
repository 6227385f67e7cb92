"""The numbers that define the networks, for those who build them and those who only count.

Nothing here imports torch.

Source: google-research/simclr resnet.py, tf2/resnet.py.
"""

from dataclasses import dataclass
from typing import Final, Literal

Memory = Literal["none", "selective", "block"]
"""What is computed again in the backward pass instead of kept; see `models.memory`."""


@dataclass(frozen=True)
class Depth:
    """What the number of layers in a network's name stands for."""

    blocks: tuple[int, int, int, int]  # per group
    bottleneck: bool


DEPTHS: Final = {
    10: Depth((1, 1, 1, 1), bottleneck=False),
    18: Depth((2, 2, 2, 2), bottleneck=False),
    34: Depth((3, 4, 6, 3), bottleneck=False),
    50: Depth((3, 4, 6, 3), bottleneck=True),
    101: Depth((3, 4, 23, 3), bottleneck=True),
    152: Depth((3, 8, 36, 3), bottleneck=True),
    200: Depth((3, 24, 36, 3), bottleneck=True),
}
GROUP_WIDTHS: Final = (64, 128, 256, 512)
EXPANSION: Final = 4
"""Output width of a bottleneck block over its inner width."""

SELECTIVE_RATIO: Final = 1 / 16
"""Width of the bottleneck that chooses, as a share of the stream's width (paper: 1/16)."""
LEAST_SELECTIVE_WIDTH: Final = 32


def scaled(channels: int, width: float) -> int:
    """Multiply a channel count by a network's width."""
    return round(channels * width)


def stem_width(width: float) -> int:
    """Return the channels of the stem.

    Raises:
        ValueError: fewer than 2 are left.
    """
    channels = scaled(GROUP_WIDTHS[0], width)
    if channels < 2:
        raise ValueError(f"width {width} leaves fewer than 2 of the stem's 64 channels")
    return channels


def selective_width(width: int) -> int:
    """Return the width of the bottleneck that chooses between two streams of `width` channels."""
    return max(int(width * SELECTIVE_RATIO), LEAST_SELECTIVE_WIDTH)
