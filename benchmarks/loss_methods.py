"""The losses that `benchmarks.loss` compares.

All take two views' projections [N, D] each and return the official sum over directions []:

    dense            ours, all logits at once: the plain reference
    chunked          ours, logits made and dropped in tiles
    fused-bf16       ours, in Triton kernels that multiply in 16 bits; on a GPU, as the next two
    fused-fp32       the same with the digits of float32
    strong           the usual cross-entropy in PyTorch, multiplied in bfloat16 and compiled
    lightly          its NTXentLoss as installed
    solo             solo-learn's formula in our words; on no registry
    metric-learning  pytorch-metric-learning's NTXentLoss as installed; cubic, so for few pairs

`tile-wise` is another problem, measured apart: between two sets, where every query has one key and
all other keys are negatives, as published by Inf-CL (DAMO-NLP-SG/Inf-CLIP). It masks nothing, so it
cannot express NT-Xent, whose anchors are no negatives of themselves. It has as many logits.
"""

from typing import Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.peers import (
    Loss,
    has_lightly,
    imported,
    lightly_loss,
    metric_learning_loss,
    solo_loss,
)
from bigsimclr.losses.nt_xent import nt_xent

TEMPERATURE: Final = 0.1
ROW_CHUNK: Final = {"cpu": 1024, "cuda": 4096}
MOST_CUBIC_PAIRS: Final = 256  # 2.2 GB
APART: Final = "tile-wise"
# The largest errors of value and gradient, over the value and over the largest gradient.
TOLERANCE: Final = {"fused-bf16": 5e-3, "strong": 5e-2}
FLOAT32_TOLERANCE: Final = 1e-4

_OTHERS: Final = {"lightly": lightly_loss, "metric-learning": metric_learning_loss}


def names(device: torch.device) -> list[str]:
    """Return the methods that run here, and say which are not installed."""
    found = ["dense", "chunked"]
    if device.type == "cuda":
        found += ["fused-bf16", "fused-fp32", "strong"]
    if has_lightly():
        found.append("lightly")
    if imported("pytorch_metric_learning.losses") is not None:
        found.append("metric-learning")
    return [*found, "solo", APART]


def runs(name: str, pairs: int) -> bool:
    """Tell whether a method is asked for as many pairs."""
    return name != "metric-learning" or pairs <= MOST_CUBIC_PAIRS


def build(name: str, device: torch.device) -> Loss:
    """Return a method."""
    if name in _OTHERS:
        return _OTHERS[name](TEMPERATURE)
    match name:
        case "solo":
            return solo_loss(TEMPERATURE)
        case "strong":
            return torch.compile(_strong, dynamic=False)
        case "tile-wise":
            return lambda first, second: tile_wise(first, second, side=ROW_CHUNK[device.type])
    row_chunk = ROW_CHUNK[device.type] if name == "chunked" else None
    fused = name.removeprefix("fused-") if name.startswith("fused-") else None
    return lambda first, second: nt_xent(
        first, second, temperature=TEMPERATURE, row_chunk=row_chunk, fused=fused
    )


def reference(name: str) -> Loss:
    """Return what a method should give, for float64."""
    if name == APART:
        return _two_sets
    return lambda first, second: nt_xent(first, second, temperature=TEMPERATURE)


def _strong(first: Tensor, second: Tensor) -> Tensor:
    rows = F.normalize(torch.cat([first, second]), dim=1)
    with torch.autocast(first.device.type, dtype=torch.bfloat16):
        logits = rows @ rows.T
    anchors = torch.arange(len(rows), device=rows.device)
    itself = anchors[:, None] == anchors[None, :]
    logits = (logits.float() / TEMPERATURE).masked_fill(itself, -torch.inf)
    return 2.0 * F.cross_entropy(logits, anchors.roll(len(first)))


# --- another problem -------------------------------------------------------------------------


def _sets(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys [2N, D]: every view asks for the other one."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    return torch.cat([first, second]), torch.cat([second, first])


def _two_sets(first: Tensor, second: Tensor) -> Tensor:
    queries, keys = _sets(first, second)
    logits = queries @ keys.T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(keys), device=keys.device))


def tile_wise(first: Tensor, second: Tensor, *, side: int) -> Tensor:
    """Return the loss of two sets, with logits in tiles of `side`."""
    loss: Tensor = _TileWise.apply(*_sets(first, second), side)
    return loss


class _TileWise(Function):
    """A running logarithm of sums over tiles; the tiles are made again for the gradient.

    Once for both gradients, where the published kernels make them for each.
    """

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, queries: Tensor, keys: Tensor, side: int) -> Tensor:
        sums = queries.new_full((len(queries),), -torch.inf)
        for some, total in zip(queries.split(side), sums.split(side), strict=True):
            for others in keys.split(side):
                logits = (some @ others.T).div_(TEMPERATURE)
                total.copy_(torch.logaddexp(total, logits.logsumexp(1)))
        ctx.save_for_backward(queries, keys, sums)
        ctx.side = side  # type: ignore[attr-defined]
        return (sums - (queries * keys).sum(1) / TEMPERATURE).mean()

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, sums = ctx.saved_tensors  # type: ignore[attr-defined]
        side = ctx.side  # type: ignore[attr-defined]
        of_queries, of_keys = -keys, -queries
        tiles = zip(queries.split(side), of_queries.split(side), sums.split(side), strict=True)
        for some, of_some, total in tiles:
            for others, of_others in zip(keys.split(side), of_keys.split(side), strict=True):
                shares = (some @ others.T).div_(TEMPERATURE).sub_(total[:, None]).exp_()
                of_some.addmm_(shares, others)
                of_others.addmm_(shares.T, some)
        factor = gradient / TEMPERATURE / len(queries)
        return of_queries.mul_(factor), of_keys.mul_(factor), None
