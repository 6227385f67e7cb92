"""LARS: SGD with momentum whose rate adapts to each kernel's norm and gradient norm.

With adaptation off it is SGD with momentum in the TensorFlow form, where the rate is inside the
momentum buffer. A form that multiplies the buffer by the rate instead differs as soon as the rate
changes, that is at every step of a schedule.

Source: google-research/simclr lars_optimizer.py, tf2/lars_optimizer.py; arXiv 1708.03888.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, overload

import torch
from torch import Tensor, _foreach_add, _foreach_mul, _foreach_norm
from torch.optim import Optimizer
from typing_extensions import override

from bigsimclr.optim import lars_cpu
from bigsimclr.optim.batches import Batch, flat_pieces, in_batches

if TYPE_CHECKING:
    from bigsimclr.kernels.lars_update import LarsUpdate

SquaredNorms = Callable[[list[Tensor]], list[Tensor]]
"""Squared L2 norms [] of tensors; one that sums over ranks makes LARS work on sharded tensors.

LARS gives it the norms of this rank's pieces, whose norm is that of what they are pieces of.
"""


_OWN: Final = (
    "momentum",
    "trust_coefficient",
    "nesterov",
    "classic",
    "_squared_norms",
    "_is_fused",
)
"""Settings of the whole optimizer, which `Optimizer` would leave out of a copy."""


class LARS(Optimizer):
    """Layer-wise adaptive rates with momentum; no value is read back from a GPU.

    Each group carries `weight_decay` (per update, added to the gradient) and `adapt` (whether the
    rate follows |weights| / |gradient|); bare parameters all adapt, which the scales and biases of
    batch norm should not: `bigsimclr.parameter_groups` makes the official groups. The trust ratio
    is 1 where either norm is 0. Parameters without a gradient are left alone.

    Args:
        params: Parameters, or groups of them with `weight_decay` and `adapt`.
        learning_rate: Rate of every group that has none of its own; kept under the key `lr`.
        momentum: Share of the previous update that is kept.
        trust_coefficient: Scales |weights| / |gradient|; dimensionless.
        nesterov: Look ahead along the momentum.
        classic: Momentum of the adapted updates (official default); False adapts the momentum.
        squared_norms: Replaces the local computation of squared norms.
        fused: Update all groups at once with `bigsimclr.kernels.lars_update`, which needs Triton,
            where every parameter is float32 and none is kept on the host. The rates `lr` then
            become tensors on the device, which `bigsimclr.optim.set_learning_rate` fills, so that a
            step captured in a CUDA graph follows them. The graph does not keep what it reads:
            keep the optimizer as long.

    Raises:
        ValueError: A setting is impossible.

    Source: google-research/simclr lars_optimizer.py.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        classic: bool = True,
        squared_norms: SquaredNorms | None = None,
        fused: bool = False,
    ) -> None:
        if learning_rate < 0 or trust_coefficient <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"learning_rate {learning_rate} must be at least 0, trust_coefficient "
                f"{trust_coefficient} positive and momentum {momentum} in [0, 1)"
            )
        self.momentum = momentum
        self.trust_coefficient = trust_coefficient
        self.nesterov = nesterov
        self.classic = classic
        self._squared_norms = squared_norms
        self._is_fused = fused
        self._copies: Mapping[Tensor, Tensor] = {}
        self._settings: list[tuple[int, float, bool]] = []  # of groups, and their parameters
        self._kernels: LarsUpdate | None = None  # for parameters of these settings
        self._working: list[Tensor | None] = []  # copies of the parameters in their order
        super().__init__(params, {"lr": learning_rate, "weight_decay": 0.0, "adapt": True})

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy consists of; it makes kernels of its own."""
        own = {name: value for name, value in vars(self).items() if name in _OWN}
        return {
            **super().__getstate__(),
            **own,
            "_copies": {},
            "_settings": [],
            "_kernels": None,
            "_working": [],
        }

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters in, with state that is complete from the start."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        self._is_fused = self._is_fused and all(_suits_kernels(p) for p in added)
        for parameter in added:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients first, as other optimizers accept it.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self._is_fused:
                self._update_at_once()
            else:
                for group in self.param_groups:
                    parameters = [p for p in group["params"] if p.grad is not None]
                    if parameters:
                        self._update(
                            parameters,
                            rate=group["lr"],
                            weight_decay=group["weight_decay"],
                            adapt=group["adapt"],
                        )
        return loss

    def _update_at_once(self) -> None:
        """Apply one update to all groups with the kernels."""
        from bigsimclr.kernels.lars_update import LarsUpdate

        parameters = self._parameters()
        settings = [
            (len(group["params"]), group["weight_decay"], group["adapt"])
            for group in self.param_groups
        ]
        if self._kernels is None or settings != self._settings:
            self._settings = settings
            self._kernels = LarsUpdate(
                parameters,
                weight_decays=[decay for count, decay, _ in settings for _ in range(count)],
                adapts=[adapt for count, _, adapt in settings for _ in range(count)],
                momentum=self.momentum,
                trust_coefficient=self.trust_coefficient,
                nesterov=self.nesterov,
                classic=self.classic,
                squared_norms=self._squared_norms,
            )
            self._working = [self._copies.get(parameter) for parameter in parameters]
        self._rates_to(parameters[0].device)
        # To look each parameter up takes longer than to see that the state is in their order.
        if not all(map(operator.is_, self.state, parameters)):
            in_order = {parameter: self.state[parameter] for parameter in parameters}
            self.state.clear()
            self.state.update(in_order)
        self._kernels.update(
            weights=parameters,
            gradients=[parameter.grad for parameter in parameters],
            momenta=[state["momentum"] for state in self.state.values()],
            rates=[group["lr"] for group in self.param_groups for _ in group["params"]],
            working=self._working,
        )

    def writes_copies(self, copies: Mapping[Tensor, Tensor]) -> bool:
        """Write bf16 copies of parameters in every step from now on, if the kernels can.

        Args:
            copies: by parameter, a tensor [...] of its shape and layout.

        Returns:
            Whether it does; else nothing changes.
        """
        if not self._is_fused or any(c.dtype != torch.bfloat16 for c in copies.values()):
            return False
        self._copies = dict(copies)
        self._kernels = None
        return True

    def _parameters(self) -> list[Tensor]:
        """Return all parameters."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _rates_to(self, device: torch.device) -> None:
        """Turn rates that are numbers into tensors [] on the device, equal ones into the same."""
        known: dict[float, Tensor] = {}
        for group in self.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                if rate not in known:
                    known[rate] = torch.full((), rate, dtype=torch.float32, device=device)
                group["lr"] = known[rate]

    def _update(
        self, parameters: list[Tensor], *, rate: float | Tensor, weight_decay: float, adapt: bool
    ) -> None:
        """Apply one update to the parameters of one group."""
        if self.classic and self.momentum and not self.nesterov and self._squared_norms is None:
            parameters = self._update_on_cpu(
                parameters, rate=rate, weight_decay=weight_decay, adapt=adapt
            )
            if not parameters:
                return
        batches = in_batches(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self.state[p]["momentum"] for p in parameters],
        )
        if not self.classic:
            for batch in batches:
                slopes = _slopes(batch, weight_decay)
                torch._foreach_mul_(batch.momenta, self.momentum)
                torch._foreach_add_(batch.momenta, slopes)
        factors: list[Any] = [rate] * len(parameters)
        if adapt:
            factors = list(self._trust(batches, len(parameters), weight_decay).mul_(rate).unbind())
        for batch in batches:
            own = [factors[owner] for owner in batch.owners]
            self._move(batch, own, weight_decay=weight_decay)

    def _update_on_cpu(
        self, parameters: list[Tensor], *, rate: float | Tensor, weight_decay: float, adapt: bool
    ) -> list[Tensor]:
        """Apply one update to those that are on a CPU and without gaps; return the others."""
        most = lars_cpu.ELEMENTS * torch.get_num_threads()
        others: list[Tensor] = []
        found: list[list[lars_cpu.Piece]] = []
        for parameter in parameters:
            gradient, momentum = parameter.grad, self.state[parameter]["momentum"]
            pieces: list[lars_cpu.Piece] = []
            if parameter.is_cpu and parameter.dtype in lars_cpu.TYPES and gradient is not None:
                pieces = flat_pieces((parameter, gradient, momentum), most)
            if pieces:
                found.append(pieces)
            else:
                others.append(parameter)
        if adapt:
            lars_cpu.adapt(
                found,
                float(rate),
                weight_decay=weight_decay,
                momentum=self.momentum,
                trust_coefficient=self.trust_coefficient,
            )
        else:
            every = [piece for pieces in found for piece in pieces]
            lars_cpu.move(every, float(rate), weight_decay=weight_decay, momentum=self.momentum)
        return others

    def _move(self, batch: Batch, factors: list[Any], *, weight_decay: float) -> None:
        """Update a batch by its directions times their factors."""
        steps = _list(_foreach_mul(self._directions(batch, weight_decay), factors))
        if self.classic:
            torch._foreach_mul_(batch.momenta, self.momentum)
            torch._foreach_add_(batch.momenta, steps)
            if self.nesterov:
                torch._foreach_add_(steps, batch.momenta, alpha=self.momentum)
            else:
                steps = batch.momenta
        torch._foreach_sub_(batch.weights, steps)

    def _directions(self, batch: Batch, weight_decay: float) -> list[Tensor]:
        """Return what the trust ratio sets the weights against."""
        if self.classic:
            return _slopes(batch, weight_decay)
        if self.nesterov:
            slopes = _slopes(batch, weight_decay)
            return _list(_foreach_add(slopes, batch.momenta, alpha=self.momentum))
        return batch.momenta

    def _trust(self, batches: list[Batch], parameters: int, weight_decay: float) -> Tensor:
        """Return the trust ratios [P] of as many parameters."""
        pieces: list[list[Tensor]] = [[] for _ in range(2 * parameters)]
        for batch in batches:
            directions = self._directions(batch, weight_decay)
            owners = [*batch.owners, *(parameters + owner for owner in batch.owners)]
            found = _foreach_norm([*batch.weights, *directions])
            for owner, norm in zip(owners, found, strict=True):
                pieces[owner].append(norm)
        # The norm of a tensor is the norm of its pieces' norms.
        joined = [torch.stack(norms) if len(norms) > 1 else norms[0] for norms in pieces]
        if self._squared_norms is None:
            norms = torch.stack(_list(_foreach_norm(joined)))
        else:
            norms = torch.stack(self._squared_norms(joined)).sqrt()
        weights, lengths = norms[:parameters], norms[parameters:]
        known = (weights > 0) & (lengths > 0)
        return torch.where(known, self.trust_coefficient * weights / lengths, 1.0)


def _suits_kernels(parameter: Tensor) -> bool:
    from bigsimclr.kernels import is_interpreted

    return parameter.dtype == torch.float32 and (parameter.is_cuda or is_interpreted())


def _slopes(batch: Batch, weight_decay: float) -> list[Tensor]:
    """Return gradients with the decay, which the official code compares with the weights too."""
    if weight_decay == 0:
        return batch.gradients
    return _list(_foreach_add(batch.gradients, batch.weights, alpha=weight_decay))


def _list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what a foreach operation gave as a list."""
    return list(tensors)
