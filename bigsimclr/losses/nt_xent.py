"""NT-Xent, the contrastive loss of SimCLR, in its official form and with its metrics.

With N pairs there are 2N anchors. Anchor i has one positive, the other view of its image, and
2N-2 negatives (plus the queue). Its loss is

    loss_i = log(1 + sum_negatives exp(s_ij / T) / exp(s_ip / T))

and the value is the sum over all anchors divided by N: twice the mean over anchors, because the
official code adds its two directions.

The positive stays out of the sum over negatives. Formulas that put it in and take the difference
of two nearly equal logarithms lose every digit once the views are well aligned.

Source: google-research/simclr tf2/objective.py (`add_contrastive_loss`); arXiv 2002.05709 eq. 1.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from bigsimclr.losses.tiled import tiled_anchor_losses
from bigsimclr.world import ALONE, World

if TYPE_CHECKING:
    from bigsimclr.kernels.nt_xent import Grade

METRIC_ROWS = 1024
"""Anchors per block of `contrastive_metrics`; bounds its memory to METRIC_ROWS x pairs."""


@dataclass(frozen=True)
class ContrastiveMetrics:
    """How well the second views are told apart by the first ones."""

    accuracy: Tensor  # [], share of anchors whose most similar second view is their own
    entropy: Tensor  # [], nats, of the softmax over the second views


def nt_xent(
    first: Tensor,  # [B, D] projections of the first views
    second: Tensor,  # [B, D] projections of the second views, same order of images
    *,
    temperature: float = 0.1,
    row_chunk: int | None = None,
    queue: Tensor | None = None,  # [Q, D] further negatives of every anchor, constants
    normalise: bool = True,
    fused: "Grade | None" = None,
    world: World = ALONE,
) -> Tensor:
    """Return the contrastive loss of a batch of pairs: the sum of both directions.

    Over several ranks it is the mean over this rank's images, compared with those of all ranks.
    The mean of the ranks' losses is the loss of the global batch, and the mean of the gradients
    that each finds for its parameters is its gradient: no factor of the world size is needed.

    float64 is computed in float64, everything else in float32, also under autocast.

    Args:
        first: Projections of the first views.
        second: Projections of the second views.
        temperature: Divides the similarities; dimensionless.
        row_chunk: Anchors per chunk. None builds all logits at once and is the plain reference;
            a number recomputes them in the backward pass, in at most `row_chunk` x (2B + Q)
            logits of memory, with the same value and gradient.
        queue: Past projections; no gradient flows into them.
        normalise: Compare by cosine; False compares by inner product.
        fused: Compute in Triton kernels, of which memory holds no logit at all: "fp32" with the
            digits of float32, "bf16" faster, with those of bf16. For a GPU; cosines only.
        world: The ranks, each with as many pairs and the same queue; every rank makes this call,
            and the backward pass.

    Returns:
        The loss [], float32 or float64.

    Raises:
        ValueError: If shapes differ, the batch is empty, a setting is not positive, or the fused
            kernels cannot compute what is asked for.

    Source: google-research/simclr tf2/objective.py.
    """
    _check(first, second, queue, temperature=temperature, row_chunk=row_chunk)
    if fused is not None:
        return _fused(first, second, queue, temperature, fused, world, normalise=normalise)
    with torch.autocast(first.device.type, enabled=False):
        rows = torch.cat([_precise(first), _precise(second)])
        constants = rows.new_empty(0, rows.shape[1]) if queue is None else queue.detach()
        constants = constants.to(rows.dtype)
        if normalise:
            rows, constants = unit_rows(rows), unit_rows(constants)
        if row_chunk is None:
            losses = _dense_anchor_losses(rows, constants, temperature, world)
        else:
            # A cosine needs no look at the data, which would wait for the device.
            is_bounded = normalise or world.size > 1
            largest = 1.0 if is_bounded else _largest_product(rows, constants)
            losses = tiled_anchor_losses(
                rows,
                constants,
                temperature=temperature,
                row_chunk=row_chunk,
                largest=largest / temperature,
                world=world,
            )
        return losses.sum() / first.shape[0]


def unit_rows(rows: Tensor) -> Tensor:
    """Divide every row [N, D] by its length, lengths below 1e-6 counting as 1e-6.

    Source: `tf.math.l2_normalize`, as google-research/simclr tf2/objective.py calls it.
    """
    return rows * rows.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()


@torch.no_grad()
def contrastive_metrics(
    first: Tensor,  # [B, D]
    second: Tensor,  # [B, D]
    *,
    temperature: float = 0.1,
    world: World = ALONE,
) -> ContrastiveMetrics:
    """Measure how well first views find their second views, among second views only.

    Over several ranks: this rank's first views among all ranks' second views.

    Source: google-research/simclr tf2/metrics.py (`update_pretrain_metrics_train`).
    """
    _check(first, second, None, temperature=temperature, row_chunk=None)
    with torch.autocast(first.device.type, enabled=False):
        anchors, candidates = unit_rows(_precise(first)), unit_rows(_precise(second))
        candidates = world.gather(candidates).flatten(0, 1)
        pairs = len(anchors)
        own = torch.arange(pairs, device=anchors.device) + world.rank * pairs
        found, entropy = anchors.new_zeros(()), anchors.new_zeros(())
        for start in range(0, pairs, METRIC_ROWS):
            logits = anchors[start : start + METRIC_ROWS] @ candidates.T / temperature
            found += (logits.argmax(1) == own[start : start + METRIC_ROWS]).sum()
            share = logits.softmax(1)
            entropy -= (share * (share + 1e-8).log()).sum()
        return ContrastiveMetrics(accuracy=found / pairs, entropy=entropy / pairs)


@dataclass(frozen=True)
class NtXent:
    """NT-Xent with its settings bound, for the training loop."""

    temperature: float  # dimensionless
    row_chunk: int | None = None  # anchors per chunk; None: all logits at once
    fused: "Grade | None" = None  # in Triton kernels, of this precision
    world: World = ALONE

    def __call__(self, first: Tensor, second: Tensor, *, queue: Tensor | None = None) -> Tensor:
        """Return the loss [] of projections [B, D], [B, D] and past projections [Q, D]."""
        return nt_xent(
            first,
            second,
            temperature=self.temperature,
            row_chunk=self.row_chunk,
            queue=queue,
            fused=self.fused,
            world=self.world,
        )

    def metrics(self, first: Tensor, second: Tensor) -> ContrastiveMetrics:
        """Return accuracy and entropy of projections [B, D], [B, D]."""
        return contrastive_metrics(first, second, temperature=self.temperature, world=self.world)


def _fused(
    first: Tensor,
    second: Tensor,
    queue: Tensor | None,
    temperature: float,
    grade: "Grade",
    world: World,
    *,
    normalise: bool,
) -> Tensor:
    from bigsimclr.kernels import is_interpreted
    from bigsimclr.kernels.nt_xent import fused_nt_xent

    if not first.is_cuda and not is_interpreted():
        raise ValueError(f"fused NT-Xent needs projections on a GPU, not on {first.device}")
    if not normalise or first.dtype == torch.float64:
        raise ValueError("fused NT-Xent compares by cosine, and computes no float64")
    with torch.autocast(first.device.type, enabled=False):
        constants = None if queue is None else unit_rows(queue.detach().float())
        return fused_nt_xent(
            first, second, constants, temperature=temperature, grade=grade, world=world
        )


def _dense_anchor_losses(
    rows: Tensor, constants: Tensor, temperature: float, world: World
) -> Tensor:
    """Return this rank's anchors' losses [2B] by plain autograd on all logits [2B, 2BW + Q]."""
    pairs = rows.shape[0] // 2
    first, second = (world.gather_rows(view) for view in rows.chunk(2))
    logits = rows @ torch.cat([first, second]).T / temperature
    image = world.rank * pairs + torch.arange(2 * pairs, device=rows.device) % pairs
    candidate = torch.arange(2 * len(first), device=rows.device) % len(first)
    logits = logits.masked_fill(image[:, None] == candidate[None, :], -math.inf)
    logits = torch.cat([logits, rows @ constants.T / temperature], dim=1)
    positive = (rows[:pairs] * rows[pairs:]).sum(1).repeat(2) / temperature
    # -log sigmoid(x) is log(1 + exp(-x)) without overflow, and exactly 0 where no negative exists.
    return -F.logsigmoid(positive - logits.logsumexp(1))


def _largest_product(rows: Tensor, constants: Tensor) -> float:
    """Return a bound on the inner products of the rows with each other and with the constants."""
    with torch.no_grad():
        lengths = torch.cat([rows, constants]).norm(dim=1)
        return float(lengths[: len(rows)].max() * lengths.max())


def _precise(rows: Tensor) -> Tensor:
    """Return float64 as it is and anything else as float32."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _check(
    first: Tensor,
    second: Tensor,
    queue: Tensor | None,
    *,
    temperature: float,
    row_chunk: int | None,
) -> None:
    """Refuse shapes and settings that have no loss."""
    for projections in (first, second):
        if not isinstance(projections, Tensor):
            raise ValueError(
                f"projections must be a tensor, not a {type(projections).__name__}; "
                "a ProjectionHead returns those of every layer, the last of them is compared"
            )
    if first.ndim != 2 or first.shape != second.shape or first.shape[0] == 0:
        raise ValueError(
            f"two non-empty [B, D] of one shape expected, not {tuple(first.shape)} "
            f"and {tuple(second.shape)}"
        )
    if queue is not None and (queue.ndim != 2 or queue.shape[1] != first.shape[1]):
        raise ValueError(f"queue must be [Q, {first.shape[1]}], not {tuple(queue.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if row_chunk is not None and row_chunk < 1:
        raise ValueError(f"row_chunk must be positive, not {row_chunk}")
