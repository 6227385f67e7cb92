"""Forward pass, loss and backward pass of a direct update as one CUDA graph.

A step of a small network on a small batch is hundreds of launches that take the host longer than
the GPU. A graph is recorded once and replayed with one launch; shapes must not change, and nothing
inside may wait for the host. What a strategy does with gradients, and the optimizer, stay outside.
"""

import gc
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from bigsimclr.data.loader import Batch
from bigsimclr.engine import Losses, Objective
from bigsimclr.engine.step import direct_gradients
from bigsimclr.models.norm import frozen_running_statistics
from bigsimclr.parallel import Strategy

_WARM_PASSES: Final = 3
"""Before recording: libraries choose kernels and allocate in their first passes."""


class GraphedGradients:
    """Gradients of direct updates, recorded in the first one and replayed from then on.

    Args:
        objective: the stage's rows and loss, which must keep their shapes.
        strategy: one that holds whole parameters; its loss scale must not change.
    """

    def __init__(self, objective: Objective, strategy: Strategy) -> None:
        self._objective = objective
        self._strategy = strategy
        self._recorded: _Recorded | None = None

    def __call__(self, views: Tensor, batch: Batch) -> Losses:
        """Set the parameters' gradients to those of a batch, and return its losses.

        Args:
            views: [V*B,3,H,W] on the GPU, of the shape of the first call's.
            batch: what they were made of.

        Returns:
            Losses that the next call overwrites.
        """
        if self._recorded is None:
            self._recorded = _Recorded(self._objective, self._strategy, views, batch)
        return self._recorded.replay(views, batch)

    def __enter__(self) -> "GraphedGradients":
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the graph; before the processes leave each other, which waits for graphs."""
        if self._recorded is not None:
            self._recorded.close()
            self._recorded = None


class _Recorded:
    """A graph with the memory that it reads and writes."""

    def __init__(
        self, objective: Objective, strategy: Strategy, views: Tensor, batch: Batch
    ) -> None:
        self._strategy = strategy
        self._views = views.clone(memory_format=torch.preserve_format)
        self._labels = batch.labels.to(views.device)
        batch = replace(batch, labels=self._labels)
        parameters = [p for p in objective.model.parameters() if p.requires_grad]
        _warm_up(objective, strategy, self._views, batch, parameters)
        gc.collect()  # autograd graphs in cycles would tie the recording to their streams
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as that which watches collectives, may use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            losses = direct_gradients(objective, batch, self._views, strategy, sends=False)
        self._losses = Losses(losses.total.detach(), losses.metrics)
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._nothing = torch.zeros((), device=views.device, requires_grad=True)

    def close(self) -> None:
        """Forget the graph, and with it the collectives that it holds."""
        self._graph.reset()

    def replay(self, views: Tensor, batch: Batch) -> Losses:
        """Run the graph on other images."""
        self._views.copy_(views)
        self._labels.copy_(batch.labels, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        # An empty backward pass tells the strategy that all gradients are there, to be sent.
        with self._strategy.synchronise(when=True):
            self._strategy.backward(self._nothing * 0.0)
        return self._losses


def _warm_up(
    objective: Objective,
    strategy: Strategy,
    views: Tensor,
    batch: Batch,
    parameters: list[nn.Parameter],
) -> None:
    """Pass the first batch some times, as recording will, and leave nothing behind."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side), frozen_running_statistics(objective.model):
        for _ in range(_WARM_PASSES):
            direct_gradients(objective, batch, views, strategy, sends=False)
            for parameter in parameters:
                parameter.grad = None
    current.wait_stream(side)
