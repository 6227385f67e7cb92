"""Four ways to make one training step: ours, a strong baseline, lightly's and solo-learn's.

Each takes the same two views of the same images, the same initial weights, and LARS with the same
settings. A step is forward, loss, backward and update; it returns the loss as the official sum
over directions, and waits for nothing.

ours      what the training stages run: `Contrast` under the strategy of one process, through
          `engine.step.compute_gradients`, metrics and finite check included.
strong    the plain network, compiled, in channels_last, both views in one forward pass; all logits
          at once; LARS over lists of tensors.
lightly   as its documentation writes the loop: a forward pass for each view, contiguous images, its
          NTXentLoss, its LARS.
solo      solo-learn's formulas: channels_last, a forward pass for each view, its loss with masks,
          its LARS, one parameter after the other.

On a GPU ours and strong compute in bf16, the other two in fp16 with a scaled loss, as their own
benchmarks and recipes do; on a CPU all of them in fp32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, _foreach_norm, nn
from torch.nn import Parameter, functional as F
from torch.optim import Optimizer

from benchmarks.networks import network
from benchmarks.peers import TRUST, lightly_lars, lightly_loss, solo_lars, solo_loss
from benchmarks.plain_network import compile_blocks, plain_network
from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import centre_draws
from bigsimclr.data.loader import Batch
from bigsimclr.engine.graph import GraphedGradients
from bigsimclr.engine.step import direct_gradients
from bigsimclr.kernels import Choice, uses_triton
from bigsimclr.losses import build_loss
from bigsimclr.models import build_model, restore_model
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.cost import Precision
from bigsimclr.models.fusing import fuse
from bigsimclr.models.memory import save_memory
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.optim.tensors import tensors_of
from bigsimclr.parallel import build_strategy
from bigsimclr.parallel.precision import AUTOCAST
from bigsimclr.recipe.sections import Lars, NtXentLoss
from bigsimclr.recipe.strategies import ParallelSection
from bigsimclr.stages.pretrain import Contrast
from bigsimclr.world import World

MethodName = Literal["ours", "strong", "lightly", "solo"]
Compiling = Literal["whole", "blocks", "none"]
"""What of the strong baseline is compiled: all of it at once, each kind of block once, or nothing.

Blocks take a fraction of the time to compile, and leave the loss and the sums between them."""

SEED: Final = 0
TEMPERATURE: Final = 0.1
LEARNING_RATE: Final = 0.1
WEIGHT_DECAY: Final = 1e-4
MOMENTUM: Final = 0.9


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str  # as `benchmarks.networks` names it
    batch: int  # images
    size: int  # pixels of their side


class Loop(Protocol):
    """One way to train."""

    def step(self) -> Tensor:
        """Make one training step and return its loss []."""
        ...

    def held(self) -> Iterator[Tensor]:
        """Yield what may rest on the host between turns: weights, statistics, momentum."""
        ...


@dataclass(frozen=True)
class Views:
    """Random views [2B,3,H,W] in [0, 1], in two memory formats, on the device."""

    channels_last: Tensor  # as augmentation returns them
    contiguous: Tensor


def views_of(case: Case, device: torch.device) -> Views:
    """Draw the views of all steps."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (2 * case.batch, 3, case.size, case.size)
    views = torch.rand(shape, generator=generator).to(device)
    return Views(views.contiguous(memory_format=torch.channels_last), views)


@lru_cache(maxsize=1)  # to draw those of a large network takes longer than to train it a step
def initial_weights(case: Case) -> dict[str, Tensor]:
    """Return the weights and statistics that every way starts from."""
    return build_model(network(case.model), seed=SEED).state_dict()


def initial_model(case: Case) -> SimCLR:
    """Return our network with its own copy of them, in training mode."""
    weights = {name: tensor.clone() for name, tensor in initial_weights(case).items()}
    return restore_model(network(case.model), weights).train()


def precision_of(method: MethodName, device: torch.device) -> Precision:
    """Return the arithmetic that a method computes in."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if method in ("ours", "strong") else "fp16"


@dataclass(frozen=True)
class Ways:
    """How our step is computed, as the keys of a recipe's section `parallel` say."""

    kernels: Choice
    memory: Memory
    cuda_graph: bool


class OurLoop:
    """The step of our training stages."""

    def __init__(self, case: Case, views: Tensor, world: World, ways: Ways) -> None:
        architecture = network(case.model)
        assert architecture.head is not None
        model = initial_model(case)
        fused = uses_triton(ways.kernels, world.device)
        if fused:
            fuse(model)
        save_memory(model, ways.memory)
        self._objective = Contrast(
            model,
            build_loss(NtXentLoss(temperature=TEMPERATURE), world, fused=fused),
            width=architecture.head.output_width,
            queue=None,
            world=world,
        )
        parallel = ParallelSection(precision=precision_of("ours", world.device))
        self._strategy = build_strategy(parallel, world)
        section = Lars(
            kind="lars",
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
            trust_coefficient=TRUST,
        )
        kinds = parameter_kind(model)
        self._strategy.prepare(
            model,
            partial(
                build_optimizer, section, kinds=kinds, learning_rate=LEARNING_RATE, fused=fused
            ),
        )
        self._graph = GraphedGradients(self._objective, self._strategy) if ways.cuda_graph else None
        self._batch = _stand_in(case)
        self._views = views

    def step(self) -> Tensor:
        """Make one update as the training loop does."""
        return self.update(self._views, self._batch)

    def update(self, views: Tensor, batch: Batch) -> Tensor:
        """Make one update from other views [2B,3,H,W], those of a batch."""
        self._strategy.set_learning_rate(LEARNING_RATE)
        if self._graph is not None:
            losses = self._graph(views, batch)
        else:
            losses = direct_gradients(self._objective, batch, views, self._strategy)
        self._strategy.update()
        return losses.total.detach()

    def held(self) -> Iterator[Tensor]:
        """Yield nothing: a captured step knows its tensors by their address."""
        return iter(())


def _stand_in(case: Case) -> Batch:
    """Return a batch of as many images as the views are of; they are made already."""
    sizes = np.full((case.batch, 2), case.size, np.int32)
    return Batch(
        pixels=torch.empty(case.batch, 3, 1, 1, dtype=torch.uint8),
        draws=centre_draws(ViewSettings(image_size=case.size), sizes),
        labels=torch.full((case.batch,), -1),
        indices=torch.arange(case.batch),
    )


class StrongLoop:
    """What a careful user of plain PyTorch runs."""

    def __init__(self, case: Case, views: Tensor, *, compiled: Compiling) -> None:
        self._precision = precision_of("strong", views.device)
        self._network = plain_network(network(case.model), initial_weights(case))
        self._network.to(views.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        kernels, others = _groups(self._network)
        self._optimizer = ForeachLars(kernels, others)
        self._views = views
        self._loss = torch.compile(self._plain_loss) if compiled == "whole" else self._plain_loss
        if compiled == "blocks":
            compile_blocks(self._network)

    def _plain_loss(self, views: Tensor) -> Tensor:
        with _autocast(views.device, self._precision):
            rows = self._network(views)
        first, second = F.normalize(rows.float()).chunk(2)
        return dense_nt_xent(first, second)

    def step(self) -> Tensor:
        """Make one update."""
        loss = self._loss(self._views)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def held(self) -> Iterator[Tensor]:
        """Yield weights, statistics and momentum."""
        yield from tensors_of(self._network).values()
        yield from self._optimizer.momentum


def dense_nt_xent(
    first: Tensor,  # [B, D] of length 1
    second: Tensor,  # [B, D] of length 1
) -> Tensor:
    """Return the official loss [] as cross-entropy over all logits [2B, 2B]."""
    rows = torch.cat([first, second])
    diagonal = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / TEMPERATURE).masked_fill(diagonal, -torch.inf)
    own = torch.arange(len(rows), device=rows.device).roll(len(first))
    return 2.0 * F.cross_entropy(logits, own)


class ForeachLars:
    """LARS over lists of tensors, as the official code defines it."""

    def __init__(self, kernels: Sequence[Parameter], others: Sequence[Parameter]) -> None:
        self._kernels: list[Tensor] = list(kernels)
        self._parameters: list[Tensor] = [*kernels, *others]
        self.momentum = [torch.zeros_like(p) for p in self._parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter and drop its gradient."""
        steps = [p.grad for p in self._parameters if p.grad is not None]
        adapted = steps[: len(self._kernels)]
        torch._foreach_add_(adapted, self._kernels, alpha=WEIGHT_DECAY)
        weights = torch.stack(list(_foreach_norm(self._kernels)))
        slopes = torch.stack(list(_foreach_norm(adapted)))
        ratio = torch.where((weights > 0) & (slopes > 0), TRUST * weights / slopes, 1.0)
        torch._foreach_mul_(adapted, list(ratio.unbind()))
        torch._foreach_mul_(self.momentum, MOMENTUM)
        torch._foreach_add_(self.momentum, steps, alpha=LEARNING_RATE)
        torch._foreach_sub_(self._parameters, self.momentum)
        for parameter in self._parameters:
            parameter.grad = None


class PeerLoop:
    """A loop of two forward passes, as lightly and solo-learn write it."""

    def __init__(
        self,
        case: Case,
        views: Tensor,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        make_optimizer: Callable[..., Optimizer],
    ) -> None:
        device = views.device
        self._precision = precision_of("lightly", device)
        self._network = plain_network(network(case.model), initial_weights(case))
        memory_format = torch.contiguous_format if views.is_contiguous() else torch.channels_last
        self._network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        kernels, others = _groups(self._network)
        self._optimizer = make_optimizer(
            kernels,
            others,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "fp16")
        self._loss = loss
        self._views = views.chunk(2)

    def step(self) -> Tensor:
        """Make one update."""
        with _autocast(self._views[0].device, self._precision):
            first, second = (self._network(view) for view in self._views)
            loss = self._loss(first, second)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return loss.detach()

    def held(self) -> Iterator[Tensor]:
        """Yield weights, statistics and momentum."""
        yield from tensors_of(self._network).values()
        for state in self._optimizer.state.values():
            yield from state.values()


def build_loop(
    method: MethodName,
    case: Case,
    views: Views,
    world: World,
    *,
    ways: Ways,  # of ours
    compiled: Compiling,  # of the strong baseline
) -> Loop:
    """Make one way to train."""
    match method:
        case "ours":
            return OurLoop(case, views.channels_last, world, ways)
        case "strong":
            return StrongLoop(case, views.channels_last, compiled=compiled)
        case "lightly":
            loss = lightly_loss(TEMPERATURE)
            return PeerLoop(case, views.contiguous, loss=loss, make_optimizer=lightly_lars)
        case "solo":
            loss = solo_loss(TEMPERATURE)
            return PeerLoop(case, views.channels_last, loss=loss, make_optimizer=solo_lars)


def _groups(model: nn.Module) -> tuple[list[Parameter], list[Parameter]]:
    """Return what decays and adapts, and what does not: scales and shifts of batch norm."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
