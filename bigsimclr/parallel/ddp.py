"""Data parallelism: every rank holds all parameters, and gradients are averaged over the ranks.

A gradient is sent as soon as the backward pass has made its bucket's last one, so that sending
hides behind computing. Buckets are fixed when training begins, and so is the order of their sums:
a run that is resumed on as many ranks goes on bit by bit. `torch`'s DistributedDataParallel, made
for a forward pass through its wrapper, rearranges its buckets after the first update.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from bigsimclr.models.simclr import SimCLR
from bigsimclr.optim.tensors import tensors_of
from bigsimclr.parallel import Choose, MakeOptimizer, Update
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single, trained
from bigsimclr.world import Sum, World

BUCKET_BYTES = 25 << 20

Exchange = Literal["fp32", "bf16"]
"""Type in which gradients travel: their own, which is float32, or rounded to bfloat16."""


@dataclass
class _Bucket:
    """Parameters whose gradients travel together."""

    parameters: list[nn.Parameter]
    exchange: Exchange
    missing: int = 0  # gradients that the last backward pass has yet to make
    sent: list[nn.Parameter] = field(default_factory=list)  # those that have a gradient
    sum: Sum | None = None  # on its way

    def send(self, world: World) -> None:
        """Start adding up the gradients of all ranks."""
        self.sent = [parameter for parameter in self.parameters if parameter.grad is not None]
        if self.sent:
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in self.sent])
            self.sum = world.start_sum(flat.bfloat16() if self.exchange == "bf16" else flat)

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


class Buckets:
    """The gradients of a model, averaged over the ranks while the backward pass goes on.

    Args:
        world: the ranks.
        parameters: those that take a gradient, in the order of the model.
        bucket_bytes: gradients that travel together.
        exchange: type in which they do.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[nn.Parameter],
        *,
        bucket_bytes: int,
        exchange: Exchange,
    ) -> None:
        self._world = world
        self._buckets: list[_Bucket] = []
        self._next = 0  # bucket that is sent next: the same order on every rank
        self._is_last = True
        # Backward passes make gradients roughly in the opposite order of the parameters.
        for bucketed in in_buckets(parameters[::-1], bucket_bytes):
            bucket = _Bucket(bucketed, exchange)
            for parameter in bucketed:
                parameter.register_post_accumulate_grad_hook(partial(self._made, bucket))
            self._buckets.append(bucket)

    @contextmanager
    def synchronise(self, *, when: bool) -> Iterator[None]:
        """Send gradients during the backward pass inside, or keep them for a later one."""
        self._is_last = when
        yield

    def begin(self) -> None:
        """Expect every gradient of a backward pass that is about to begin."""
        if self._is_last:
            self._next = 0
            for bucket in self._buckets:
                bucket.missing = len(bucket.parameters)

    def end(self) -> None:
        """Wait until every gradient is the ranks' mean."""
        self._send(complete_only=False)
        for bucket in self._buckets:
            bucket.receive(self._world)

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


class DataParallel:
    """The strategy of ranks that each hold the whole model.

    Args:
        world: the ranks.
        precision: arithmetic and loss scale; its verdicts come out alike on all ranks, which all
            see the same mean of gradients.
        bucket_bytes: gradients that travel together.
        exchange: type in which they do.
    """

    def __init__(
        self,
        world: World,
        precision: Precision,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        exchange: Exchange = "fp32",
    ) -> None:
        self._world = world
        self._single = Single(precision)
        self._bucket_bytes = bucket_bytes
        self._gradient_type: Exchange = exchange
        self._buckets: Buckets | None = None

    @property
    def _averaged(self) -> Buckets:
        if self._buckets is None:
            raise AssertionError("prepare comes first")
        return self._buckets

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> None:
        """Give every rank the first rank's model, make its optimizer and watch its gradients."""
        self._single.prepare(model, make_optimizer)
        copy_from_first(model, self._world)
        self._single.refresh()
        self._buckets = Buckets(
            self._world,
            list(trained(model).values()),
            bucket_bytes=self._bucket_bytes,
            exchange=self._gradient_type,
        )

    def compute(self) -> AbstractContextManager[None]:
        """Run forward passes in the recipe's precision."""
        return self._single.compute()

    def synchronise(self, *, when: bool) -> AbstractContextManager[None]:
        """Send gradients during the backward pass inside, or keep them for a later one."""
        return self._averaged.synchronise(when=when)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the parameters', and send what is complete."""
        self._averaged.begin()
        self._single.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give the next updates this rate."""
        self._single.set_learning_rate(learning_rate)

    def update(self) -> Update:
        """Wait for the mean of gradients, then step if it is finite.

        Raises:
            NumericsError: a gradient of some rank is not finite; every rank raises.
        """
        self._averaged.end()
        return self._single.update()

    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield everything at once."""
        return self._single.whole()

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:
        """Return the tensors of the optimizer state that this rank keeps."""
        return self._single.optimizer_part(is_kept)

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take saved tensors."""
        self._single.load(model, optimizer)

    def state(self) -> dict[str, float]:
        """Return the loss scale, the same on every rank."""
        return self._single.state()

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale."""
        self._single.restore(state)


def copy_from_first(model: nn.Module, world: World) -> None:
    """Give every rank the first rank's parameters and buffers."""
    for tensor in tensors_of(model).values():
        world.copy_from(0, tensor.detach())


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise AssertionError("this parameter has a gradient")
    return parameter.grad


def in_buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
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
