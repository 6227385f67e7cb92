"""Data parallelism: every rank holds all parameters, and gradients are averaged over the ranks.

A gradient is sent as soon as the backward pass has made its bucket's last one, so that sending
hides behind computing. Buckets are fixed when training begins, and so is the order of their sums:
a run that is resumed on as many ranks goes on bit by bit. `torch`'s DistributedDataParallel, made
for a forward pass through its wrapper, rearranges its buckets after the first update.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigsimclr.models.simclr import SimCLR
from bigsimclr.parallel import MakeOptimizer, Update
from bigsimclr.parallel.single import Single
from bigsimclr.world import Sum, World

BUCKET_BYTES = 25 << 20


@dataclass
class _Bucket:
    """Parameters whose gradients travel together."""

    parameters: list[nn.Parameter]
    missing: int = 0  # gradients that the last backward pass has yet to make
    sent: list[nn.Parameter] = field(default_factory=list)  # those that have a gradient
    sum: Sum | None = None  # on its way

    def send(self, world: World) -> None:
        """Start adding up the gradients of all ranks."""
        self.sent = [parameter for parameter in self.parameters if parameter.grad is not None]
        if self.sent:
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in self.sent])
            self.sum = world.start_sum(flat)

    def receive(self, world: World) -> None:
        """Replace the gradients by the ranks' mean."""
        if self.sum is None:
            return
        mean = self.sum.wait().div_(world.size)
        gradients = [_gradient(parameter) for parameter in self.sent]
        pieces = mean.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients,
            [piece.view(gradient.shape) for piece, gradient in zip(pieces, gradients, strict=True)],
        )
        self.sum = None


class DataParallel:
    """The strategy of ranks that each hold the whole model.

    Args:
        world: the ranks.
        single: precision, loss scale and update; they come out alike on all ranks, which all see
            the same mean of gradients.
        bucket_bytes: gradients that travel together.
    """

    def __init__(self, world: World, single: Single, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world = world
        self._single = single
        self._bucket_bytes = bucket_bytes
        self._buckets: list[_Bucket] = []
        self._next = 0  # bucket that is sent next: the same order on every rank
        self._is_last = True

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> Optimizer:
        """Give every rank the first rank's model, make its optimizer and watch its gradients."""
        optimizer = self._single.prepare(model, make_optimizer)
        for tensor in (*model.parameters(), *model.buffers()):
            self._world.copy_from_first(tensor.detach())
        moving = [p for group in optimizer.param_groups for p in group["params"]]
        # Backward passes make gradients roughly in the opposite order of the parameters.
        order = {parameter: number for number, parameter in enumerate(model.parameters())}
        moving.sort(key=order.__getitem__, reverse=True)
        for parameters in _in_buckets(moving, self._bucket_bytes):
            bucket = _Bucket(parameters)
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._made, bucket))
            self._buckets.append(bucket)
        return optimizer

    def compute(self) -> AbstractContextManager[None]:
        """Run forward passes in the recipe's precision."""
        return self._single.compute()

    @contextmanager
    def synchronise(self, *, when: bool) -> Iterator[None]:
        """Send gradients during the backward pass inside, or keep them for a later one."""
        self._is_last = when
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the parameters', and send what is complete."""
        if self._is_last:
            self._next = 0
            for bucket in self._buckets:
                bucket.missing = len(bucket.parameters)
        self._single.backward(loss)

    def update(self) -> Update:
        """Wait for the mean of gradients, then step if it is finite.

        Raises:
            NumericsError: a gradient of some rank is not finite; every rank raises.
        """
        self._send(complete_only=False)
        for bucket in self._buckets:
            bucket.receive(self._world)
        return self._single.update()

    def state(self) -> dict[str, float]:
        """Return the loss scale, the same on every rank."""
        return self._single.state()

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale."""
        self._single.restore(state)

    def _made(self, bucket: _Bucket, _: Tensor) -> None:
        if self._is_last:
            bucket.missing -= 1
            self._send(complete_only=True)

    def _send(self, *, complete_only: bool) -> None:
        # What no loss depends on has no gradient, on no rank: its bucket is sent at the end.
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if complete_only and bucket.missing:
                return
            bucket.send(self._world)
            self._next += 1


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise AssertionError("this parameter has a gradient")
    return parameter.grad


def _in_buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Cut parameters into runs of one type that are about `most` bytes together."""
    buckets: list[list[nn.Parameter]] = []
    held = 0
    for parameter in parameters:
        if not buckets or held >= most or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.nbytes
    return buckets
