"""Losses on class logits: cross-entropy with hidden labels, and distillation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.world import ALONE, World

HIDDEN_LABEL = -1
"""Label of an image whose class the stage may not see; any negative label counts as hidden."""


def cross_entropy(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # int64 [N]; negative: hidden
    world: World = ALONE,
) -> Tensor:
    """Return the mean cross-entropy [] over the images that show their label, 0 if none does.

    Over several ranks the sum of this rank's images is divided by the mean number of labels on a
    rank: the ranks' mean is that over all images, wherever the labels lie.

    Source: google-research/simclr tf2/objective.py (`add_supervised_loss`).
    """
    with torch.autocast(logits.device.type, enabled=False):
        shown = labels >= 0
        total = F.cross_entropy(
            _precise(logits),
            labels.where(shown, HIDDEN_LABEL),
            ignore_index=HIDDEN_LABEL,
            reduction="sum",
        )
        return total / shown_per_rank(shown, world)


def shown_per_rank(
    shown: Tensor,  # bool [N]
    world: World,
) -> Tensor:  # []
    """Return the mean number of images on a rank that show their label; of none, the least share.

    Not 0, so that a sum over no image can be divided by it.
    """
    return world.total(shown.sum()).clamp_min(1) / world.size


def distillation(
    student: Tensor,  # [N, C] logits
    teacher: Tensor,  # [N, C] logits; no gradient flows into them
    *,
    temperature: float,
) -> Tensor:
    """Return the mean cross-entropy [] of the student under the teacher's softened classes.

    The factor T^2 keeps the gradient's size independent of the temperature. It is a cross-entropy,
    so its least value is the teacher's entropy, not 0.

    Source: google-research/simclr colabs/distillation_self_training.ipynb (`add_kd_loss`);
    arXiv 2006.10029 eq. 2.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"two [N, C] of one shape expected, not {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    with torch.autocast(student.device.type, enabled=False):
        target = (_precise(teacher.detach()) / temperature).softmax(1)
        return temperature**2 * F.cross_entropy(_precise(student) / temperature, target)


def _precise(logits: Tensor) -> Tensor:
    """Return float64 as it is and anything else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
