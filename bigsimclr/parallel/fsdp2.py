"""FSDP2: parameters, gradients and optimizer state are sharded, and gathered block by block.

Each residual block, the projection head and the rest gather their parameters before they compute
and free them afterwards. Precision is autocast's, as in every strategy: parameters, gradients and
batch norm stay float32.

Shapes: W ranks.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from bigsimclr.models.resnet import BasicBlock, Bottleneck
from bigsimclr.models.simclr import SimCLR
from bigsimclr.optim import set_learning_rate
from bigsimclr.optim.tensors import check_tensors, copy_tensors
from bigsimclr.parallel import Choose, MakeOptimizer, Update
from bigsimclr.parallel.ddp import copy_from_first
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.shards import Part, Shards
from bigsimclr.world import World


class FullySharded:
    """The strategy of ranks that each hold a part of every parameter.

    Args:
        world: the ranks.
        precision: arithmetic and loss scale.
        reshard: free a block's gathered parameters after its forward pass, too.
    """

    def __init__(self, world: World, precision: Precision, *, reshard: bool) -> None:
        self._world = world
        self._precision = precision
        self._reshard = reshard
        self._prepared: _Prepared | None = None

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> None:
        """Shard the first rank's model and make the optimizer of this rank's parts."""
        model.to(self._world.device)
        copy_from_first(model, self._world)
        root = shard_model(model, self._world, reshard=self._reshard)
        sharded: dict[str, DTensor] = {}
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise AssertionError(f"{name} is not sharded")
            sharded[name] = parameter
        # FSDP2 keeps what a rank holds in one piece, so that a flat view shares its storage.
        parts = {
            name: Part(
                Parameter(local_of(tensor).view(-1), requires_grad=tensor.requires_grad),
                tensor.shape,
            )
            for name, tensor in sharded.items()
        }
        shards = Shards(self._world, parts, make_optimizer)
        self._prepared = _Prepared(root, sharded, parts, dict(model.named_buffers()), shards)

    @property
    def _ready(self) -> "_Prepared":
        if self._prepared is None:
            raise AssertionError("prepare comes first")
        return self._prepared

    def compute(self) -> AbstractContextManager[None]:
        """Run forward passes in the recipe's precision."""
        return self._precision.compute()

    @contextmanager
    def synchronise(self, *, when: bool) -> Iterator[None]:
        """Reduce gradients in the backward pass inside, or keep whole ones for a later one."""
        self._ready.root.set_requires_gradient_sync(when)
        self._ready.root.set_is_last_backward(when)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the parameters' gradients."""
        self._precision.scaled(loss).backward()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give the next updates this rate."""
        set_learning_rate(self._ready.shards.optimizer, learning_rate)

    def update(self) -> Update:
        """Step this rank's parts if every gradient of every rank is finite.

        Raises:
            NumericsError: a gradient of some rank is not finite; every rank raises.
        """
        ready = self._ready
        for name, part in ready.parts.items():
            gradient = ready.parameters[name].grad
            part.local.grad = None if gradient is None else local_of(gradient).reshape(-1)
        self._precision.unscale(ready.shards.gradients())
        verdict = self._precision.judge(ready.shards.gradient_norm())
        if not verdict.skipped:
            ready.shards.optimizer.step()
        for name, part in ready.parts.items():
            part.local.grad = ready.parameters[name].grad = None
        return verdict

    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        """Gather one parameter after the other; buffers are whole on every rank."""
        for name, part in self._ready.parts.items():
            yield {name: self._ready.shards.gather(name, part.local)}
        yield self._ready.buffers

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:
        """Gather the optimizer state, and return what this rank keeps."""
        return self._ready.shards.optimizer_part(is_kept)

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take this rank's parts of saved tensors."""
        ready = self._ready
        named = {**ready.parameters, **ready.buffers}
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in named.items()}
        check_tensors(wanted, model, what="model")
        ready.shards.load_parameters(model)
        copy_tensors(ready.buffers, {name: model[name] for name in ready.buffers}, what="model")
        ready.shards.load_optimizer(optimizer)

    def state(self) -> dict[str, float]:
        """Return the loss scale, the same on every rank."""
        return self._precision.state()

    def restore(self, state: dict[str, float]) -> None:
        """Take back the loss scale."""
        self._precision.restore(state)


@dataclass(frozen=True)
class _Prepared:
    """What exists once there is a model."""

    root: FSDPModule
    parameters: dict[str, DTensor]  # all of them, trained or not
    parts: dict[str, Part]  # views of this rank's part of each
    buffers: dict[str, Tensor]
    shards: Shards


def shard_model(model: SimCLR, world: World, *, reshard: bool) -> FSDPModule:
    """Replace a model's parameters by sharded ones, on any device, `meta` included.

    Every unit that gathers its parameters returns tensors, which is how FSDP2 knows when to gather
    them again for the backward pass; the model itself, which returns more, keeps none.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            # FSDP2 takes no channels_last weights.
            parameter.data = parameter.data.contiguous()
    # Convolutions follow the layout of their input where that of their weights says nothing.
    model.backbone.register_forward_pre_hook(_channels_last)
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = [m for m in model.backbone.modules() if isinstance(m, BasicBlock | Bottleneck)]
    units = [*blocks, model.backbone, model.head, model.classifier]
    for unit in units:
        if unit is not None:
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def _channels_last(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, without a graph."""
    if not isinstance(tensor, DTensor):
        raise AssertionError("this tensor is not sharded")
    return tensor.to_local().detach()
