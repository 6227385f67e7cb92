"""ZeRO stage 1 in plain PyTorch: one rank updates a parameter, and alone keeps its state.

Parameters and gradients are whole everywhere, as in data parallelism, so that layer-wise rates need
no collective; after an update its owner sends each parameter to the others.

Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1 (optimizer states).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from bigsimclr.errors import CheckpointError
from bigsimclr.models.simclr import SimCLR
from bigsimclr.optim import load_optimizer_state, optimizer_state, set_learning_rate
from bigsimclr.optim.tensors import copy_tensors, tensors_of
from bigsimclr.parallel import Choose, MakeOptimizer, Update
from bigsimclr.parallel.ddp import BUCKET_BYTES, Buckets, Exchange, copy_from_first, in_buckets
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import trained
from bigsimclr.world import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigsimclr.models.layers import WorkingWeights


class ZeroOne:
    """The strategy of ranks that share the optimizer state by parameters.

    Args:
        world: the ranks.
        precision: arithmetic and loss scale.
        bucket_bytes: gradients, or updated parameters, that travel together.
        exchange: type in which gradients do.
    """

    def __init__(
        self,
        world: World,
        precision: Precision,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        exchange: Exchange = "fp32",
    ) -> None:
        self._gradient_type: Exchange = exchange
        self._world = world
        self._precision = precision
        self._bucket_bytes = bucket_bytes
        self._model: SimCLR | None = None
        self._buckets: Buckets | None = None
        self._working: WorkingWeights | None = None
        self._optimizer: Optimizer | None = None  # None: this rank owns nothing
        self._owned: list[list[Parameter]] = []  # by rank

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> None:
        """Give every rank the first rank's model, and each parameter an owner."""
        self._model = model.to(self._world.device)
        copy_from_first(model, self._world)
        self._working = self._precision.working_weights(model)
        parameters = trained(model)
        owners = _owners(list(parameters.values()), self._world.size)
        named = list(zip(parameters.items(), owners, strict=True))
        self._owned = [
            [parameter for (_, parameter), owner in named if owner == rank]
            for rank in range(self._world.size)
        ]
        own = {name: parameter for (name, parameter), owner in named if owner == self._world.rank}
        self._optimizer = make_optimizer(own) if own else None
        self._buckets = Buckets(
            self._world,
            list(parameters.values()),
            bucket_bytes=self._bucket_bytes,
            exchange=self._gradient_type,
        )

    @property
    def _averaged(self) -> Buckets:
        if self._buckets is None:
            raise AssertionError("prepare comes first")
        return self._buckets

    @property
    def _whole(self) -> SimCLR:
        if self._model is None:
            raise AssertionError("prepare comes first")
        return self._model

    def compute(self) -> AbstractContextManager[None]:
        """Run forward passes in the recipe's precision."""
        return self._precision.compute()

    def synchronise(self, *, when: bool) -> AbstractContextManager[None]:
        """Send gradients during the backward pass inside, or keep them for a later one."""
        return self._averaged.synchronise(when=when)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the parameters', and send what is complete."""
        self._averaged.begin()
        self._precision.scaled(loss).backward()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give the next updates this rate."""
        if self._optimizer is not None:
            set_learning_rate(self._optimizer, learning_rate)

    def update(self) -> Update:
        """Wait for the mean of gradients, update what this rank owns, and exchange the results.

        Raises:
            NumericsError: a gradient of some rank is not finite; every rank raises.
        """
        self._averaged.end()
        parameters = [parameter for owned in self._owned for parameter in owned]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._precision.unscale(gradients)
        verdict = self._precision.judge(torch.nn.utils.get_total_norm(gradients, foreach=True))
        if not verdict.skipped:
            if self._optimizer is not None:
                self._optimizer.step()
            self._exchange()
            self._refresh()
        for parameter in parameters:
            parameter.grad = None
        return verdict

    def _refresh(self) -> None:
        if self._working is not None:
            self._working.refresh()

    @torch.no_grad()
    def _exchange(self) -> None:
        for rank, owned in enumerate(self._owned):
            # What took no gradient on any rank has not moved.
            moved = [parameter for parameter in owned if parameter.grad is not None]
            for bucket in in_buckets(moved, self._bucket_bytes):
                flat = torch.cat([parameter.detach().reshape(-1) for parameter in bucket])
                self._world.copy_from(rank, flat)
                pieces = flat.split([parameter.numel() for parameter in bucket])
                for parameter, piece in zip(bucket, pieces, strict=True):
                    parameter.copy_(piece.view(parameter.shape))

    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield everything at once."""
        yield tensors_of(self._whole)

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:  # noqa: ARG002 - owned already
        """Return the optimizer state that this rank owns."""
        return {} if self._optimizer is None else optimizer_state(self._optimizer)

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take saved tensors; of the optimizer's, those that this rank owns."""
        copy_tensors(tensors_of(self._whole), model, what="model")
        strange = {key.partition("/")[2] for key in optimizer} - trained(self._whole).keys()
        if strange:
            raise CheckpointError(f"optimizer state does not fit this run: {sorted(strange)[:3]}")
        if self._optimizer is not None:
            own = optimizer_state(self._optimizer).keys()
            load_optimizer_state(
                self._optimizer, {key: value for key, value in optimizer.items() if key in own}
            )
        self._refresh()

    def state(self) -> dict[str, float]:
        """Return the loss scale, the same on every rank."""
        return self._precision.state()

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale."""
        self._precision.restore(state)


def _owners(parameters: Sequence[Parameter], ranks: int) -> list[int]:
    """Return the rank that owns each parameter: the largest first, each to whom has least."""
    loads = [0] * ranks
    owners = [0] * len(parameters)
    for number in sorted(range(len(parameters)), key=lambda n: -parameters[n].numel()):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += parameters[number].numel()
    return owners
