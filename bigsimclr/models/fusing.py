"""Which parts of a network have kernels of their own, or another way to compute the same."""

from torch import nn

from bigsimclr.models.layers import fuse_first_convolution
from bigsimclr.models.norm import fuse_batch_norm
from bigsimclr.models.resnet import fork_bottlenecks, fuse_max_pool
from bigsimclr.models.selective import fuse_selective_kernels


def fuse(model: nn.Module, *, bypass: bool = True) -> None:
    """Let a network compute with `bigsimclr.kernels` where they take what it computes.

    It computes the same functions, and its state is the same.

    Args:
        model: a network of this package, or a part of one.
        bypass: also what passes by the forward pass of a module inside, and so by its hooks:
            selective kernels that of their batch norm, bottlenecks that of their first convolution.
            Of a bottleneck's gradients, hooks must then copy what they keep (`models.fork`).
    """
    fuse_first_convolution(model)
    fuse_batch_norm(model)
    fuse_max_pool(model)
    if bypass:
        fork_bottlenecks(model)
        fuse_selective_kernels(model)
