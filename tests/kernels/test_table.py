"""A table on the device is sent again only where it has changed."""

import torch

from bigsimclr.kernels.table import DeviceTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_table_that_has_not_changed_is_not_sent() -> None:
    table = DeviceTable(2, 3, DEVICE)
    first = table.send([[1, 2, 3], [4, 5, 2**62]])
    assert first.tolist() == [[1, 2, 3], [4, 5, 2**62]]
    assert table.send([[1, 2, 3], [4, 5, 2**62]]) is first


def test_a_table_keeps_its_numbers_while_the_next_is_sent() -> None:
    table = DeviceTable(1, 2, DEVICE)
    sent = [table.send([[number, -number]]) for number in range(5)]
    assert [copy.tolist() for copy in sent] == [[[n, -n]] for n in range(5)]
