"""Networks apart from any run: official checkpoints in, files for other programs out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bigsimclr.models import Architecture
    from bigsimclr.models.simclr import SimCLR


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before a network sees it; pixels are in [0, 1], nothing else."""

    image_size: int  # side of the square input in pixels
    resize: Literal["tf2", "tf1"]  # bicubic kernel, as in the official TF2 or TF1 code
    eval_crop_proportion: float  # side of the centre crop as a share of the shorter side

    def in_words(self) -> str:
        """Say what is done to an image, for whoever has to do it without this package."""
        share = self.eval_crop_proportion
        crop = f"{share:g} of the shorter side" if share < 1 else "the whole shorter side"
        return f"centre square of {crop}, then {self.resize} bicubic to {self.image_size} pixels"


@dataclass(frozen=True)
class PortableModel:
    """A network with all that another program needs to use it."""

    model: "SimCLR"  # in evaluation mode, on the CPU
    architecture: "Architecture"
    classes: tuple[str, ...]  # names of the classifier's outputs; empty without a classifier
    preprocessing: Preprocessing
    origin: str  # one line: where the weights come from
