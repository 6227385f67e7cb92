"""The averaged copy and the queue of past projections."""

import pytest
import torch
from torch import nn

from bigsimclr.engine.momentum import AveragedCopy, Queue
from bigsimclr.errors import CheckpointError
from bigsimclr.optim.tensors import tensors_of


def network(seed):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return model


def test_the_copy_starts_equal_and_shares_nothing():
    model = network(0)
    averaged = AveragedCopy(model, 0.9)
    for name, tensor in model.state_dict().items():
        assert torch.equal(averaged.model.state_dict()[name], tensor)
        assert averaged.model.state_dict()[name].data_ptr() != tensor.data_ptr()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in averaged.model.parameters())


def test_update_averages_weights_and_statistics():
    model, other = network(0), network(1)
    other[1].num_batches_tracked.fill_(5)
    averaged = AveragedCopy(model, 0.75)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        averaged.update([tensors_of(other)])
        for name, tensor in other.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor
    expected["1.num_batches_tracked"] = torch.tensor(5)
    for name, tensor in averaged.state().items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-14, atol=0)


def test_the_copy_s_state_round_trips():
    averaged = AveragedCopy(network(0), 0.5)
    averaged.update([tensors_of(network(1))])
    saved = {name: tensor.clone() for name, tensor in averaged.state().items()}
    restored = AveragedCopy(network(2), 0.5)
    restored.restore(saved)
    for name, tensor in restored.state().items():
        assert torch.equal(tensor, saved[name])
    assert not any(parameter.requires_grad for parameter in restored.model.parameters())


def test_state_of_another_model_is_refused():
    averaged = AveragedCopy(network(0), 0.5)
    with pytest.raises(CheckpointError, match="averaged copy does not fit"):
        averaged.restore({"other": torch.zeros(1)})
    saved = dict(averaged.state())
    saved["0.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        averaged.restore(saved)


@pytest.mark.parametrize("ema_decay", [0.0, 1.0])
def test_impossible_decays_are_refused(ema_decay):
    with pytest.raises(ValueError, match="ema_decay"):
        AveragedCopy(network(0), ema_decay)


def directions(*numbers):
    """Rows in the plane whose angle, in hundredths, is the number; their length varies."""
    angles = torch.tensor(numbers, dtype=torch.float64) / 100
    return torch.stack([angles.cos(), angles.sin()], 1) * (1 + angles[:, None])


def numbers_of(rows):
    return torch.atan2(rows[:, 1], rows[:, 0]).mul(100).round().int().tolist()


def queue_of(length):
    return Queue(length, 2, dtype=torch.float64)


def test_the_queue_fills_then_replaces_the_oldest():
    queue = queue_of(5)
    assert queue.filled.shape == (0, 2)
    queue.push(directions(1, 2))
    assert numbers_of(queue.filled) == [1, 2]
    queue.push(directions(3, 4))
    queue.push(directions(5, 6, 7))
    assert numbers_of(queue.filled) == [6, 7, 3, 4, 5]
    queue.push(directions(8, 9, 10))
    assert numbers_of(queue.filled) == [6, 7, 8, 9, 10]
    queue.push(directions(11))
    assert numbers_of(queue.filled) == [11, 7, 8, 9, 10]


def test_more_rows_than_places_keep_the_last():
    queue = queue_of(3)
    queue.push(directions(1))
    queue.push(directions(*range(2, 10)))
    assert sorted(numbers_of(queue.filled)) == [7, 8, 9]
    queue.push(directions(10))
    assert sorted(numbers_of(queue.filled)) == [8, 9, 10]


def test_no_row_changes_nothing():
    queue = queue_of(3)
    queue.push(directions(1, 2))
    queue.push(torch.empty(0, 2))
    assert numbers_of(queue.filled) == [1, 2]


def test_pieces_of_a_batch_are_the_batch():
    whole, pieces = queue_of(7), queue_of(7)
    rows = directions(*range(1, 11))
    for start in (0, 5):
        whole.push(rows[start : start + 5])
    for start in range(0, 10, 2):
        pieces.push(rows[start : start + 2])
    assert torch.equal(whole.filled, pieces.filled)


def test_rows_are_stored_normalised_and_without_graph():
    queue = queue_of(4)
    queue.push(directions(1, 50).requires_grad_())
    torch.testing.assert_close(queue.filled.norm(dim=1), torch.ones(2).double())
    assert not queue.filled.requires_grad


@pytest.mark.parametrize("pushed", [0, 2, 6])
def test_the_queue_s_state_round_trips(pushed):
    queue, restored = queue_of(4), queue_of(4)
    for number in range(pushed):
        queue.push(directions(number + 1))
    restored.push(directions(90, 91, 92))
    restored.restore({name: tensor.clone() for name, tensor in queue.state().items()})
    assert torch.equal(restored.filled, queue.filled)
    for each in (queue, restored):
        each.push(directions(20, 21))
    assert torch.equal(restored.filled, queue.filled)


def test_state_of_another_queue_is_refused():
    queue = queue_of(4)
    with pytest.raises(CheckpointError, match="rows is"):
        queue.restore(queue_of(5).state())
    with pytest.raises(CheckpointError, match="missing"):
        queue.restore({})
    broken = {**queue.state(), "next": torch.tensor(4)}
    with pytest.raises(CheckpointError, match="cannot be at 4"):
        queue.restore(broken)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\[n, 2\]"):
        queue_of(4).push(torch.ones(3, 5))
    with pytest.raises(ValueError, match="positive"):
        Queue(0, 2)
