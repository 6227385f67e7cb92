"""Parameters of which each rank holds a part: their optimizer, norms, and whole tensors.

A part is a run of the flattened parameter, perhaps an empty one; the ranks' parts, one behind the
other, are the whole. FSDP2 and ZeRO both cut in this way, wherever they cut.

Shapes: W ranks, P parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor, _foreach_norm
from torch.nn import Parameter

from bigsimclr.optim import optimizer_state
from bigsimclr.optim.tensors import check_tensors
from bigsimclr.parallel import Choose, MakeOptimizer
from bigsimclr.world import World


@dataclass(frozen=True)
class Part:
    """What one rank holds of a parameter."""

    local: Parameter  # [n], a view of the storage that the forward pass is gathered from
    shape: Size  # of the whole parameter


class Shards:
    """The parameters of a model as this rank's parts, with the optimizer of those that are trained.

    Every rank has a part of every parameter, so that all make the same collectives.

    Args:
        world: the ranks.
        parts: this rank's parts, by the model's names, in the same order on every rank.
        make_optimizer: makes the optimizer of the parts that take a gradient.
    """

    def __init__(
        self, world: World, parts: Mapping[str, Part], make_optimizer: MakeOptimizer
    ) -> None:
        self._world = world
        self._parts = dict(parts)
        own = torch.tensor([part.local.numel() for part in parts.values()], device=world.device)
        lengths = world.gather(own).T.tolist()  # [P][W]
        self._lengths = dict(zip(parts, lengths, strict=True))
        for name, part in parts.items():
            if sum(self._lengths[name]) != math.prod(part.shape):
                raise AssertionError(f"the ranks' parts of {name} are not the whole")
        self.optimizer = make_optimizer(
            {name: part.local for name, part in parts.items() if part.local.requires_grad},
            squared_norms=self.squared_norms,
        )

    def squared_norms(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the squared norms [] of whole tensors, given this rank's part of each.

        One collective for all of them; every rank gets the same bits.
        """
        own = torch.stack(list(_foreach_norm(tensors))).square()
        return list(self._world.total(own).unbind())

    def gradients(self) -> list[Tensor]:
        """Return this rank's parts of the gradients that there are."""
        gradients = [part.local.grad for part in self._parts.values()]
        return [gradient for gradient in gradients if gradient is not None]

    def gradient_norm(self) -> Tensor:
        """Return the norm [] of the gradients of all whole parameters."""
        own = torch.nn.utils.get_total_norm(self.gradients(), foreach=True)
        return self._world.total(own.to(self._world.device).square()).sqrt()

    def gather(
        self,
        name: str,
        local: Tensor,  # [n] this rank's part of the parameter, or of something of its shape
    ) -> Tensor:  # of the parameter's shape
        """Put the ranks' parts together."""
        lengths = self._lengths[name]
        # Collectives take parts of one length.
        padded = local.new_zeros(max(lengths))
        padded[: local.numel()] = local.detach()
        everyone = self._world.gather(padded)
        pieces = [row[:length] for row, length in zip(everyone, lengths, strict=True)]
        return torch.cat(pieces).view(self._parts[name].shape)

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:
        """Return the whole tensors of the optimizer state that this rank keeps, on the host."""
        kept: dict[str, Tensor] = {}
        for key, value, name in self._state():
            if name is None:
                if is_kept(key, value.nbytes):
                    kept[key] = value
                continue
            whole = self.gather(name, value)
            if is_kept(key, whole.nbytes):
                kept[key] = whole.cpu()
        return kept

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of whole tensors of the optimizer state.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or type.
        """
        state = list(self._state())
        wanted = {
            key: (value.shape if name is None else self._parts[name].shape, value.dtype)
            for key, value, name in state
        }
        check_tensors(wanted, tensors, what="optimizer state")
        for key, value, name in state:
            value.copy_(tensors[key] if name is None else self.cut(name, tensors[key]))

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of whole parameters; their shapes have been checked."""
        for name, part in self._parts.items():
            part.local.detach().copy_(self.cut(name, tensors[name]))

    def cut(
        self,
        name: str,
        whole: Tensor,  # of the parameter's shape
    ) -> Tensor:  # [n]
        """Return this rank's part."""
        lengths, rank = self._lengths[name], self._world.rank
        start = sum(lengths[:rank])
        return whole.reshape(-1)[start : start + lengths[rank]]

    def _state(self) -> list[tuple[str, Tensor, str | None]]:
        """List the optimizer's tensors: key, tensor, and the parameter whose shape it shares."""
        listed: list[tuple[str, Tensor, str | None]] = []
        for key, value in optimizer_state(self.optimizer).items():
            # A count of updates is the same on every rank.
            name = key.partition("/")[2] if value.dim() else None
            listed.append((key, value, name))
        return listed
