"""What the kernels of a GPU are for, told by their names alone.

A training step launches kernels of cuDNN, cuBLAS, PyTorch, torch.compile's, NCCL's and ours. Their
names say what they compute, so that the time of a step can be divided without knowing who launched
what. Where a name is too general to tell, it counts as "other", and the largest of those are named.

Two things names do not tell. PyTorch's sums of two tensors are counted as ends of blocks, where the
shortcut is added; an optimizer that goes through its parameters one by one launches the same. And
what torch.compile fuses counts as the first of the classes below that its name mentions.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

KernelClass = Literal[
    "convolution",
    "normalisation",
    "selection",
    "loss",
    "optimizer",
    "augmentation",
    "copies",
    "communication",
    "other",
]
"""Convolutions and matrix products; batch norm, ReLU and sums at the ends of blocks; selective
kernels; the loss; the optimizer; augmentation; copies, casts and layouts; NCCL; all others."""

CLASSES: Final[tuple[KernelClass, ...]] = get_args(KernelClass)

OURS: Final[dict[str, KernelClass]] = {
    **dict.fromkeys(
        ("measure", "merge", "apply", "reduce", "join", "differentiate"),
        "normalisation",
    ),
    **dict.fromkeys(("pool", "mix", "mix_backward", "pool_backward"), "selection"),
    **dict.fromkeys(("normalise", "add_up", "collect", "slope", "leave_unit_sphere"), "loss"),
    **dict.fromkeys(("square", "scale", "move"), "optimizer"),
    **dict.fromkeys(("_crop", "_sum_up", "_colour", "_soften"), "augmentation"),
    **dict.fromkeys(("take_maxima", "pass_gradients", "fold"), "other"),
}
"""The kernels that `bigsimclr.kernels` launches, by their whole names."""

# The first pattern that is found decides. Case is not looked at.
_PATTERNS: Final[tuple[tuple[KernelClass, str], ...]] = (
    ("communication", r"nccl|nvshmem|symm_mem|all_?reduce|all_?gather|reduce_?scatter"),
    ("copies", r"^mem(cpy|set)|multi_tensor_apply.*copy"),
    ("normalisation", r"batch_?norm|\bbn_(fw|bw)"),
    ("loss", r"log_?softmax|nll_loss|cross_entropy|log_?sum_?exp|masked_fill|argmax"),
    ("selection", r"softmax"),
    ("optimizer", r"multi_tensor_apply|foreach|fused_?(sgd|adam)|NormTwoOps|lpnorm"),
    (
        "convolution",
        r"fprop|dgrad|wgrad|xmma|cutlass|gemm|gemv|nvjet|cublas|splitK|winograd|convolve|"
        r"cask|OffsetsKernel|cudnn::cnn|conv2d|depthwise|scalePackedTensor|triton_tem|fft2d",
    ),
    ("normalisation", r"relu|threshold|clamp_(min|scalar)|CUDAFunctor(OnSelf)?_add\b"),
    ("copies", r"nchwTo|nhwcTo|copy|convert|transpose|permute|CatArray|FillFunctor"),
    ("copies", r"triton_\w*fused_convolution"),
)
_COMPILED: Final = tuple((kind, re.compile(text, re.IGNORECASE)) for kind, text in _PATTERNS)


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel."""

    name: str
    microseconds: float
    launches: int


def class_of(name: str) -> KernelClass:
    """Say what a kernel is for.

    Args:
        name: as a profiler shows it, with or without its template arguments.
    """
    if name in OURS:
        return OURS[name]
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), "other")


def by_class(kernels: Iterable[KernelTime], *, named: int = 5) -> dict[str, dict[str, object]]:
    """Divide the time of kernels among the classes.

    Args:
        kernels: of any number of steps.
        named: kernels to name of each class, the largest first.

    Returns:
        By class, where it has any: `microseconds`, `launches`, `share` of the time of all kernels,
        and `largest`, a list of name, microseconds and launches.
    """
    found: dict[KernelClass, list[KernelTime]] = {}
    for kernel in sorted(kernels, key=lambda one: one.microseconds, reverse=True):
        found.setdefault(class_of(kernel.name), []).append(kernel)
    whole = sum(kernel.microseconds for members in found.values() for kernel in members)
    return {
        kind: {
            "microseconds": round(sum(one.microseconds for one in members), 1),
            "launches": sum(one.launches for one in members),
            "share": round(sum(one.microseconds for one in members) / whole, 4) if whole else 0.0,
            "largest": [
                {
                    "name": one.name[:160],
                    "microseconds": round(one.microseconds, 1),
                    "launches": one.launches,
                }
                for one in members[:named]
            ],
        }
        for kind in CLASSES
        if (members := found.get(kind))
    }
