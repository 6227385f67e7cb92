"""Random crops, flips, colours and blur: drawn on the host, applied in batches on the device."""

from dataclasses import dataclass
from typing import Literal

from bigsimclr.recipe.sections import CropFlip, Distort

__all__ = ["ViewSettings", "view_settings"]


@dataclass(frozen=True)
class ViewSettings:
    """How a view is made from an image; plain numbers, so that workers can carry it.

    Attributes:
        image_size: Side of the square view in pixels.
        crop_area: Smallest and largest share of the image area that a random crop covers.
        crop_aspect: Smallest and largest width / height of a random crop.
        flip_probability: Probability of a horizontal mirror image.
        colour_strength: Strength s of the colour jitter.
        colour_probability: Probability that the colours are jittered.
        grey_probability: Probability that the view becomes grey.
        blur_probability: Probability that the view is blurred.
        resize: Bicubic kernel, as in the official TF2 or TF1 code.
        eval_crop_proportion: Side of the centre crop as a share of the shorter side.
    """

    image_size: int
    crop_area: tuple[float, float] = (0.1, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    colour_strength: float = 0.0
    colour_probability: float = 0.0
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    resize: Literal["tf2", "tf1"] = "tf2"
    eval_crop_proportion: float = 0.875


def view_settings(section: CropFlip | Distort) -> ViewSettings:
    """Read the augmentation section of a recipe.

    Args:
        section: `augment` of any stage.

    Returns:
        The settings; a plain `CropFlip` draws no colours and no blur.
    """
    distort = section if isinstance(section, Distort) else None
    return ViewSettings(
        image_size=section.image_size,
        crop_area=section.crop_area,
        flip_probability=section.flip_probability,
        colour_strength=distort.colour_strength if distort else 0.0,
        colour_probability=distort.colour_probability if distort else 0.0,
        grey_probability=distort.grey_probability if distort else 0.0,
        blur_probability=distort.blur_probability if distort else 0.0,
        resize=section.resize,
        eval_crop_proportion=section.eval_crop_proportion,
    )
