"""One LARS update of many tensors: the tables that the kernels read, and their launches.

Tensors are reached through a table of addresses. It is sent to the device again only where one has
changed, as those of gradients may from step to step.

Shapes: P tensors, C chunks of all of them together.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from bigsimclr.kernels.lars import ROWS, TILES, VECTOR, Tiles, move, scale, square
from bigsimclr.kernels.table import DeviceTable

_KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LAYOUTS: Final = (torch.contiguous_format, torch.channels_last)


class LarsUpdate:
    """The launches, and the tables that they read.

    It is made for certain parameters; each call updates those that have a gradient. A call captured
    in a CUDA graph is replayed on the same memory, with the gradients and rates that are there; at
    least one other call has to come before. The graph reads tables of this object, one of them on
    the host, by their addresses: keep the object as long as the graph.

    Args:
        weights: P tensors of float32, contiguous or channels_last, as every call is given them.
        weight_decays: of each tensor.
        adapts: of each tensor, whether its rate follows |weights| / |direction|.
        momentum: share of the previous update that is kept.
        trust_coefficient: scales |weights| / |direction|; dimensionless.
        nesterov: look ahead along the momentum.
        classic: momentum of the adapted updates; False adapts the momentum.
        squared_norms: sums over the ranks, where tensors are parts of whole ones. It is given this
            rank's norms [], which stand for its parts; `scale` then takes two launches.
        tiles: of the kernels.

    Raises:
        ValueError: weights of another type or layout.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        weight_decays: Sequence[float],
        adapts: Sequence[bool],
        momentum: float,
        trust_coefficient: float,
        nesterov: bool = False,
        classic: bool = True,
        squared_norms: Callable[[list[Tensor]], list[Tensor]] | None = None,
        tiles: Tiles = TILES,
    ) -> None:
        device = weights[0].device
        sizes = [weight.numel() for weight in weights]
        counts = [-(-size // tiles.chunk) for size in sizes]
        owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(counts))
        firsts = torch.tensor([0, *accumulate(counts)])
        self._owners = owners.to(device, torch.int32)  # [C] the tensor of each chunk
        self._firsts = firsts.to(device, torch.int32)  # [P+1] the first chunk of each tensor
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._decays = torch.tensor(weight_decays, dtype=torch.float32, device=device)
        self._adapts = torch.tensor(adapts, dtype=torch.int32, device=device)
        self._sums = torch.empty(2, sum(counts), dtype=torch.float32, device=device)
        self._norms = torch.empty(2, len(sizes), dtype=torch.float32, device=device)
        self._factors = torch.empty(len(sizes), dtype=torch.float32, device=device)
        self._table = DeviceTable(ROWS, len(sizes), device)
        self._layouts = [_layout(weight) for weight in weights]
        self._lengths = sizes
        self._momentum = momentum
        self._tiles = tiles
        self._trust_coefficient = trust_coefficient
        self._form = {"CLASSIC": classic, "NESTEROV": nesterov}
        self._squared_norms = squared_norms if any(adapts) else None
        self._checked: list[list[int]] = []
        self._known: tuple[object, ...] = ()  # what the rows were made of, as it was last
        self._rows_known: list[list[int]] = []

    @torch.no_grad()
    def update(
        self,
        *,
        weights: Sequence[Tensor],  # P of float32
        gradients: Sequence[Tensor | None],  # P of float32, bf16 or fp16, shaped as the weights
        momenta: Sequence[Tensor],  # P of float32, as the weights
        rates: Sequence[Tensor],  # P of float32 [], on the device, the same one as often as it fits
        working: Sequence[Tensor | None] | None = None,  # P of bf16: copies of the weights
    ) -> None:
        """Update weights, momenta and working copies in place.

        A gradient of another layout than its weight's is copied first.

        Raises:
            ValueError: a tensor has a type that its place does not take, or a momentum or working
                copy has another layout than its weight.
        """
        # Kept until the launches: what had to be copied lives no longer than that.
        alike = [
            None if gradient is None else gradient.contiguous(memory_format=layout)
            for gradient, layout in zip(gradients, self._layouts, strict=True)
        ]
        copies = [None] * len(weights) if working is None else working
        self._launch(self._table.send(self._rows(weights, alike, momenta, copies, rates)))

    def _rows(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        working: Sequence[Tensor | None],
        rates: Sequence[Tensor],
    ) -> list[list[int]]:
        """Return the rows of the table, which as a rule are those of the last update."""
        own = [_addresses(tensors) for tensors in (weights, momenta, working)]
        changing = _addresses(gradients)
        types = [None if gradient is None else gradient.dtype for gradient in gradients]
        known = (own, changing, types, _addresses(rates))
        if known == self._known:
            return self._rows_known
        if own != self._checked:
            for number, like in enumerate(zip(self._lengths, self._layouts, strict=True)):
                _check(weights[number], torch.float32, *like, f"weight {number}")
                _check(momenta[number], torch.float32, *like, f"momentum {number}")
                _check(working[number], torch.bfloat16, *like, f"working copy {number}")
            self._checked = own
        together = [w | m | c | g for w, m, c, g in zip(*own, changing, strict=True)]
        is_aligned = [
            int((length | address) % VECTOR == 0)
            for length, address in zip(self._lengths, together, strict=True)
        ]
        kinds = [_kind(g, length) for g, length in zip(gradients, self._lengths, strict=True)]
        self._rows_known = [own[0], changing, own[1], own[2], known[-1], kinds, is_aligned]
        self._known = known
        return self._rows_known

    def _launch(self, table: Tensor) -> None:
        """Run the kernels."""
        tensors, chunks = len(self._factors), len(self._owners)
        constants = (self._owners, self._firsts, self._sizes, self._decays)
        shape = (tensors, chunks, self._momentum)
        if chunks:
            square[(chunks,)](
                table, *constants, self._adapts, self._sums, *shape,
                **self._form, CHUNK=self._tiles.chunk, num_warps=self._tiles.warps,
            )  # fmt: skip
        if self._squared_norms is None:
            self._scale(table, sums=True, factors=True)
        else:
            self._scale(table, sums=True, factors=False)
            squares = self._squared_norms(list(self._norms.view(-1).unbind()))
            self._norms.copy_(torch.stack(squares).sqrt().view(2, tensors))
            self._scale(table, sums=False, factors=True)
        if chunks:
            move[(chunks,)](
                table, *constants, self._factors, *shape,
                **self._form, CHUNK=self._tiles.chunk, num_warps=self._tiles.warps,
            )  # fmt: skip

    def _scale(self, table: Tensor, *, sums: bool, factors: bool) -> None:
        tensors, chunks = len(self._factors), len(self._owners)
        scale[(tensors,)](
            table, self._firsts, self._adapts, self._sums, self._norms, self._factors,
            tensors, chunks, self._trust_coefficient,
            SUMS=sums, FACTORS=factors, BLOCK=self._tiles.block,
        )  # fmt: skip


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return addresses [P], 0 where there is no tensor."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _kind(gradient: Tensor | None, length: int) -> int:
    """Return the number of a gradient's type.

    Raises:
        ValueError: it has none, or not as many values as its weight.
    """
    if gradient is None:
        return 0
    if gradient.dtype not in _KINDS or gradient.numel() != length:
        raise ValueError(
            f"a gradient is {gradient.dtype} of {gradient.numel()} values: it has to be float32, "
            f"bfloat16 or float16 of {length}, as its weight"
        )
    return _KINDS[gradient.dtype]


def _layout(weight: Tensor) -> torch.memory_format:
    """Return how a weight lies in memory.

    Raises:
        ValueError: in neither of the two ways that are known.
    """
    for layout in _LAYOUTS:
        if weight.is_contiguous(memory_format=layout):
            return layout
    raise ValueError(
        f"a weight of shape {tuple(weight.shape)} has strides {weight.stride()}: it has to be "
        "contiguous or channels_last"
    )


def _check(
    tensor: Tensor | None, dtype: torch.dtype, length: int, layout: torch.memory_format, name: str
) -> None:
    """Refuse a tensor that the kernels would misread.

    Raises:
        ValueError: it has another type, length or layout than they take it to have.
    """
    if tensor is None:
        return
    if (
        tensor.dtype != dtype
        or tensor.numel() != length
        or not tensor.is_contiguous(memory_format=layout)
    ):
        raise ValueError(
            f"{name} is {tensor.dtype} of {tensor.numel()} values with strides {tensor.stride()}: "
            f"it has to be {dtype} of {length}, {layout} as the weight that the tables were made of"
        )
