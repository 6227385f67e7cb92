"""Work captured in a CUDA graph: one launch, whatever its host would have to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

WARM_CALLS: Final = 3  # build kernels, and choose among those of others


@dataclass(frozen=True)
class Replay:
    """A graph, and the work that it was captured from.

    A graph knows memory by its address and keeps none of what was there before it. What the work
    holds, on the host too, has to live as long: the next capture hands free pinned memory back to
    the system, and a replay that copies from it ends the process.
    """

    graph: torch.cuda.CUDAGraph
    work: Callable[[], object]

    def __call__(self) -> None:
        """Launch the graph."""
        self.graph.replay()


def captured(work: Callable[[], object]) -> Replay:
    """Return the same work as one launch; it runs a few times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return Replay(graph, work)
