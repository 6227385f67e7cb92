"""Which parts of a network have kernels of their own."""

from torch import nn

from bigsimclr.models.layers import fuse_first_convolution
from bigsimclr.models.norm import fuse_batch_norm
from bigsimclr.models.resnet import fuse_max_pool
from bigsimclr.models.selective import fuse_selective_kernels


def fuse(model: nn.Module, *, selective_kernels: bool = True) -> None:
    """Let a network compute with `bigsimclr.kernels` where they take what it computes.

    It computes the same functions, and its state is the same.

    Args:
        model: a network of this package, or a part of one.
        selective_kernels: those as well; they pass by the forward pass of their batch norm.
    """
    fuse_first_convolution(model)
    fuse_batch_norm(model)
    fuse_max_pool(model)
    if selective_kernels:
        fuse_selective_kernels(model)
