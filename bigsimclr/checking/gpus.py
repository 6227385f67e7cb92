"""How much memory a training stage takes per GPU, by strategy, lever and number of GPUs."""

from dataclasses import dataclass
from typing import Final, get_args

from bigsimclr.checking.costs import network_cost, state_bytes, view_bytes, views_of
from bigsimclr.models import Architecture
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.cost import Cost
from bigsimclr.recipe.schema import AnyTraining
from bigsimclr.recipe.strategies import StrategyName

GPUS: Final = (8, 16, 32, 64, 128)
GPU_BYTES: Final = 80_000_000_000
"""What estimates may take of a GPU of 80 GB, which has 85 GB: the rest is for what they leave out,
images, loss, communication buffers, workspaces and fragmentation."""


@dataclass(frozen=True)
class Estimate:
    """One row of the table."""

    strategy: StrategyName
    memory: Memory
    gpu_bytes: tuple[int | None, ...]  # per number of GPUs; None where the batch does not divide


@dataclass(frozen=True)
class Smallest:
    """The least that a lever needs."""

    gpus: int
    strategy: StrategyName  # the plainest that fits


@dataclass(frozen=True)
class GpuTable:
    """Estimated memory of one GPU, with its share of the batch in one forward pass."""

    global_batch: int
    estimates: tuple[Estimate, ...]

    def smallest(self, memory: Memory) -> Smallest | None:
        """Find the smallest number of GPUs that holds the batch with a lever."""
        for column, gpus in enumerate(GPUS):
            for row in self.estimates:
                needed = row.gpu_bytes[column]
                if row.memory == memory and needed is not None and needed <= GPU_BYTES:
                    return Smallest(gpus, row.strategy)
        return None

    def as_facts(self) -> dict[str, object]:
        """Return the numbers as plain JSON values."""
        found = {memory: self.smallest(memory) for memory in get_args(Memory)}
        return {
            "gpus": list(GPUS),
            "estimates": [
                {"strategy": row.strategy, "memory": row.memory, "bytes": list(row.gpu_bytes)}
                for row in self.estimates
            ],
            "smallest": {
                memory: None if least is None else {"gpus": least.gpus, "strategy": least.strategy}
                for memory, least in found.items()
            },
        }

    def text(self) -> str:
        """Write the table, and what follows from it."""
        images = [_images(self.global_batch, gpus) for gpus in GPUS]
        lines = [
            f"GB per GPU, about; batch {self.global_batch:,}, each GPU's share in one forward pass",
            _line("GPUs", "", [f"{gpus}" for gpus in GPUS]),
            _line("images per GPU", "", ["-" if n is None else f"{n:,}" for n in images]),
        ]
        for row in self.estimates:
            cells = ["-" if n is None else f"{n / 1e9:,.1f}" for n in row.gpu_bytes]
            lines.append(_line(row.strategy, row.memory, cells))
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        texts = []
        for memory in get_args(Memory):
            least = self.smallest(memory)
            where = "none of these" if least is None else f"{least.gpus} GPUs ({least.strategy})"
            texts.append(f"memory={memory} on {where}")
        return f"80 GB are enough with {'; '.join(texts)}"


def gpu_table(recipe: AnyTraining, network: Architecture, teacher: Cost | None) -> GpuTable:
    """Estimate the memory per GPU of a training stage for every strategy and lever.

    Args:
        recipe: the stage; its own strategy, lever and micro-batch are not looked at.
        network: what it trains.
        teacher: cost of what it learns from; None where there is none, or it is not at hand.

    Raises:
        RecipeError: no network of this width exists.
    """
    batch = recipe.batch.global_batch
    levers: tuple[Memory, ...] = get_args(Memory)
    costs = {memory: network_cost(recipe, network, memory) for memory in levers}

    def gpu_bytes(strategy: StrategyName, memory: Memory, gpus: int) -> int | None:
        images = _images(batch, gpus)
        if images is None:
            return None
        own = costs[memory]
        state = state_bytes(recipe, own, teacher, strategy=strategy, world_size=gpus)
        return state + images * views_of(recipe) * view_bytes(recipe, own)

    strategies: tuple[StrategyName, ...] = get_args(StrategyName)
    return GpuTable(
        batch,
        tuple(
            Estimate(strategy, memory, tuple(gpu_bytes(strategy, memory, gpus) for gpus in GPUS))
            for strategy in strategies
            for memory in levers
        ),
    )


def _images(batch: int, gpus: int) -> int | None:
    images, rest = divmod(batch, gpus)
    return None if rest else images


def _line(first: str, second: str, cells: list[str]) -> str:
    return f"{first:<16} {second:<9} " + " ".join(f"{cell:>7}" for cell in cells)
