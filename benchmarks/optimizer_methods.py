"""LARS as different packages compute it, and what each of them should give.

All have momentum; kernels decay and adapt, all other parameters neither.

* `plain`: `bigsimclr.optim.LARS` in plain PyTorch.
* `fused`: the same with the kernels; `captured`: those in a CUDA graph; `copying`: those that write
  a bf16 copy of every weight as well. On a GPU only.
* `lightly`: its LARS as installed, where it is.
* `loop`: LARS as solo-learn publishes it, in words of our own: parameter by parameter, asking for
  the values of two norms at each.
* `apex`: the multi-tensor functions of NVIDIA's apex, where its `amp_C` has them.
* `sgd`: torch.optim.SGD(foreach=True), which has no norms to compute.

lightly, solo-learn and apex put |gradient| + decay |weight| below the ratio, where the official
code has |gradient + decay weight|.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.capture import captured as in_a_graph
from benchmarks.peers import has_lightly, imported, lightly_lars
from bigsimclr.optim import LARS

RATE: Final = 10.0  # weights change by about 1% in an update, so that rounding hides no error
MOMENTUM: Final = 0.9
DECAY: Final = 1e-4
TRUST: Final = 1e-3
LIMIT: Final = 1e-3

Step = Callable[[], object]
Make = Callable[["Parameters"], Step]


@dataclass(frozen=True)
class Parameters:
    """Parameters with gradients, by whether they decay and adapt."""

    kernels: list[torch.nn.Parameter]
    others: list[torch.nn.Parameter]

    def __iter__(self) -> Iterator[torch.nn.Parameter]:
        yield from self.kernels
        yield from self.others

    def groups(self) -> list[dict[str, object]]:
        """Return them as an optimizer of ours takes them."""
        return [
            {"params": self.kernels, "weight_decay": DECAY, "adapt": True},
            {"params": self.others, "weight_decay": 0.0, "adapt": False},
        ]

    def decay_only(self) -> list[dict[str, object]]:
        """Return them as others' optimizers take them."""
        return [{k: v for k, v in group.items() if k != "adapt"} for group in self.groups()]

    def count(self) -> int:
        """Return the number of values."""
        return sum(parameter.numel() for parameter in self)


def plain(parameters: Parameters) -> Step:
    return ours(parameters, with_kernels=False).step


def fused(parameters: Parameters) -> Step:
    return ours(parameters, with_kernels=True).step


def captured(parameters: Parameters) -> Step:
    optimizer = ours(parameters, with_kernels=True)
    replay = in_a_graph(optimizer.step)
    for parameter in parameters:
        optimizer.state[parameter]["momentum"].zero_()
    return replay


def ours(parameters: Parameters, *, with_kernels: bool) -> LARS:
    return LARS(
        parameters.groups(),
        learning_rate=RATE,
        momentum=MOMENTUM,
        trust_coefficient=TRUST,
        fused=with_kernels,
    )


def copying(parameters: Parameters) -> Step:
    from bigsimclr.kernels.lars_update import LarsUpdate

    weights = list(parameters)
    adapts = [number < len(parameters.kernels) for number in range(len(weights))]
    update = LarsUpdate(
        weights,
        weight_decays=[DECAY if adapt else 0.0 for adapt in adapts],
        adapts=adapts,
        momentum=MOMENTUM,
        trust_coefficient=TRUST,
    ).update
    momenta = [torch.zeros_like(weight) for weight in weights]
    copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
    rates = [torch.tensor(RATE, device=weights[0].device)] * len(weights)
    gradients = [weight.grad for weight in weights]
    return lambda: update(
        weights=weights, gradients=gradients, momenta=momenta, rates=rates, working=copies
    )


def sgd(parameters: Parameters) -> Step:
    groups = parameters.decay_only()
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, foreach=True).step


def lightly(parameters: Parameters) -> Step:
    return lightly_lars(
        parameters.kernels,
        parameters.others,
        learning_rate=RATE,
        weight_decay=DECAY,
        momentum=MOMENTUM,
    ).step


def loop(parameters: Parameters) -> Step:
    momenta = {parameter: torch.zeros_like(parameter) for parameter in parameters}
    adapted = set(parameters.kernels)

    @torch.no_grad()
    def step() -> None:
        for parameter, buffer in momenta.items():
            slope = parameter.grad
            assert slope is not None
            length, steepness = parameter.norm(), slope.norm()
            if parameter in adapted and length != 0 and steepness != 0:
                ratio = TRUST * length / (steepness + DECAY * length + 1e-8)
                slope = slope.add(parameter, alpha=DECAY).mul_(ratio)
            buffer.mul_(MOMENTUM).add_(slope)
            parameter.sub_(buffer, alpha=RATE)

    return step


def apex(parameters: Parameters) -> Step:
    amp_C = importlib.import_module("amp_C")  # noqa: N806 - its name
    nothing_overflowed = torch.zeros(1, dtype=torch.int32, device=parameters.kernels[0].device)
    chunk, scale, epsilon, dampening = 2048 * 32, 1.0, 0.0, 0.0
    per_tensor, nesterov, is_first, decays_last = True, False, False, False
    groups = []
    for group, decay in ((parameters.kernels, DECAY), (parameters.others, 0.0)):
        gradients = [parameter.grad for parameter in group]
        groups.append(([gradients, group, [torch.zeros_like(p) for p in group]], decay))

    @torch.no_grad()
    def step() -> None:
        for tensors, decay in groups:
            of_gradients, of_weights = (
                amp_C.multi_tensor_l2norm(chunk, nothing_overflowed, [some], per_tensor)[1]
                for some in tensors[:2]
            )
            is_unadapted = decay == 0
            amp_C.multi_tensor_lars(
                chunk, nothing_overflowed, tensors, of_gradients, of_weights, RATE, TRUST, epsilon,
                decay, MOMENTUM, dampening, nesterov, is_first, decays_last, scale, is_unadapted,
            )  # fmt: skip

    return step


def methods(device: torch.device) -> dict[str, Make]:
    """Return what can run here."""
    found: dict[str, Make] = {"plain": plain}
    if device.type == "cuda":
        found |= {"fused": fused, "captured": captured, "copying": copying}
    if has_lightly():
        found["lightly"] = lightly
    found["loop"] = loop
    if device.type == "cuda" and hasattr(imported("amp_C"), "multi_tensor_lars"):
        found["apex"] = apex
    return found | {"sgd": sgd}


# --- values ----------------------------------------------------------------------------------


def reference(method: str, weight: Tensor, gradient: Tensor, *, is_kernel: bool) -> Tensor:
    """Return the change of a parameter in two updates, in float64 by the method's definition."""
    start, gradient = weight.double(), gradient.double()
    weight, buffer = start, torch.zeros_like(start)
    for _ in range(2):
        slope = gradient + DECAY * weight if is_kernel else gradient
        trust: Tensor | float = 1.0
        if is_kernel and method in {"lightly", "loop", "apex"}:
            trust = TRUST * weight.norm() / (gradient.norm() + DECAY * weight.norm())
        elif is_kernel and method != "sgd":
            trust = TRUST * weight.norm() / slope.norm()
        buffer = MOMENTUM * buffer + trust * slope
        weight = weight - RATE * buffer
    return weight - start


@torch.no_grad()
def error(method: str, make: Make, parameters: Parameters, initial: list[Tensor]) -> float:
    """Return the largest error of a method in two updates; weights are put back before them."""
    restore(parameters, initial)
    step = make(parameters)
    restore(parameters, initial)  # making may have taken a step
    step()
    step()
    largest = 0.0
    for number, (parameter, start) in enumerate(zip(parameters, initial, strict=True)):
        assert parameter.grad is not None
        is_kernel = number < len(parameters.kernels)
        expected = reference(method, start, parameter.grad, is_kernel=is_kernel)
        difference = (parameter.double() - start.double() - expected).abs().max()
        largest = max(largest, float(difference / expected.abs().max()))
    assert largest < LIMIT, f"{method} computes something else: {largest}"
    return largest


@torch.no_grad()
def restore(parameters: Parameters, initial: list[Tensor]) -> None:
    """Put back the weights."""
    for parameter, start in zip(parameters, initial, strict=True):
        parameter.copy_(start)
