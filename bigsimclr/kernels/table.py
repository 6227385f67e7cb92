"""A table of whole numbers on the device, such as addresses, that is sent when it has changed."""

import torch
from torch import Tensor


class DeviceTable:
    """The device's copy of a table, sent without waiting for the device.

    Args:
        rows: of the table.
        columns: of the table.
        device: where it is read.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._shape = (rows, columns)
        self._device = device
        self._numbers: list[list[int]] = []
        self._table = torch.empty(0)
        # Pinned memory cannot be had while a graph is captured, so one piece is always ready.
        self._staging: Tensor | None = self._pinned()
        self._captured: list[Tensor] = []

    def send(self, numbers: list[list[int]]) -> Tensor:
        """Return the table on the device, int64 [rows, columns].

        During the capture of a CUDA graph it is a table of that graph alone: each replay sends the
        same numbers, and they outlive what other calls send.
        """
        is_captured = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if numbers == self._numbers and not is_captured:
            return self._table
        staging = self._pinned() if self._staging is None else self._staging
        staging.copy_(torch.tensor(numbers, dtype=torch.int64))
        table = staging.to(self._device, non_blocking=True)
        if is_captured:
            self._staging = None
            self._captured += [staging, table]
            return table
        # The next change may come before this copy is done: it gets memory of its own, and PyTorch
        # hands this one out again only after the copy.
        self._staging = self._pinned()
        self._numbers, self._table = numbers, table
        return table

    def _pinned(self) -> Tensor:
        return torch.empty(self._shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
