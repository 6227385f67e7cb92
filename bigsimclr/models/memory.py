"""Computing parts of a network again in the backward pass instead of keeping what they made.

Loss, gradients and running statistics stay those of the network that keeps everything, to the bit:
what is computed again is made by the same kernels from the same numbers. Batch norm, which gathers
statistics and moves its running ones, does both in the first pass only.

Shapes: N images, C channels, H x W positions.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from bigsimclr.models.anatomy import Memory
from bigsimclr.models.norm import BatchNorm, Note


class Recomputed(nn.Module):
    """A module that may compute a part of its work twice; the part must draw no random numbers.

    The lever is an attribute and no module around this one, so that parameters keep their names.
    """

    memory: Memory = "none"

    def compute(
        self,
        part: Callable[[Tensor], Tensor],
        inputs: Tensor,
        *,
        norms_in: Sequence[nn.Module],
        repeats_last: bool = False,
    ) -> Tensor:  # [N, C', H', W']
        """Compute a part, and while training keep no more of it than the lever wants.

        Args:
            part: what to compute; must not change its input.
            inputs: [N, C, H, W], kept where anything is computed again.
            norms_in: modules that hold all batch norms of the part.
            repeats_last: the last convolution is cheap and its result large, so that selective
                computes it again as well.
        """
        if self.memory == "none" or not (self.training and torch.is_grad_enabled()):
            return part(inputs)
        outputs: Tensor = checkpoint(
            part,
            inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(
                _contexts,
                norms_in,
                keeps_convolutions=self.memory == "selective",
                repeats_last=repeats_last,
            ),
        )
        return outputs


def save_memory(model: nn.Module, how: Memory) -> None:
    """Choose what the stem and the residual blocks of `model` keep for the backward pass.

    Args:
        model: any network; names and values of its parameters do not change.
        how: none keeps everything. selective keeps the inputs of stem and blocks and the results
            of their convolutions, and computes batch norm, ReLU, pooling and the selective kernels'
            mixing again, and in bottlenecks the last convolution, which is 5 to 7% of the
            arithmetic and a third of what would be kept. block keeps the inputs alone, for about a
            third more arithmetic.
    """
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.memory = how


_Context = AbstractContextManager[object]


def _contexts(
    modules: Sequence[nn.Module], *, keeps_convolutions: bool, repeats_last: bool
) -> tuple[_Context, _Context]:
    """Return what surrounds the first pass through a part, and what surrounds the second."""
    # One note for each norm and pass: several passes may come before the first backward pass.
    inside = (norm for module in modules for norm in module.modules())
    notes = [(norm, Note()) for norm in inside if isinstance(norm, BatchNorm)]
    if not keeps_convolutions:
        return _noting(notes), _noting(notes)
    kept: deque[Tensor | None] = deque()
    return (
        _within(_noting(notes), _KeepConvolutions(kept, all_but_last=repeats_last)),
        _within(_noting(notes), _TakeConvolutions(kept)),
    )


@contextmanager
def _noting(notes: Sequence[tuple[BatchNorm, Note]]) -> Iterator[None]:
    for norm, note in notes:
        norm.note = note
    try:
        yield
    finally:
        for norm, _ in notes:
            norm.note = None


@contextmanager
def _within(outer: _Context, inner: _Context) -> Iterator[None]:
    with outer, inner:
        yield


# PyTorch's create_selective_checkpoint_contexts does as much, but refuses a second pass with more
# operations than the first: autocast's copies of weights, which the first pass may find made.


class _KeepConvolutions(TorchDispatchMode):
    """Keeps what convolutions return, in their order; None for a last one that is made again."""

    def __init__(self, kept: deque[Tensor | None], *, all_but_last: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._all_but_last = all_but_last

    @override
    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and isinstance(outputs, Tensor):
            # The tensor itself will know the graph, which will know this object.
            self._kept.append(outputs.detach())
        return outputs

    @override
    def __exit__(self, *error: object) -> None:
        if self._all_but_last and self._kept:
            self._kept[-1] = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class _TakeConvolutions(TorchDispatchMode):
    """Returns what was kept instead of convolving again; each result is let go when it is taken."""

    def __init__(self, kept: deque[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    @override
    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten.convolution.default:
            outputs = self._kept.popleft()
            if outputs is not None:
                return outputs
        return func(*args, **(kwargs or {}))
