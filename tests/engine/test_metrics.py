"""Accuracies."""

import math

import pytest
import torch

from bigsimclr.engine.metrics import nearest_neighbour_accuracy, top_k_accuracy, top_k_correct

LOGITS = torch.tensor(
    [[0.1, 0.7, 0.2, 0.0], [0.9, 0.3, 0.5, 0.4], [0.0, 0.1, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]]
)
LABELS = torch.tensor([1, 2, 0, 1])


@pytest.mark.parametrize(
    ("k", "correct"), [(1, [1, 0, 0, 0]), (2, [1, 1, 0, 1]), (4, [1, 1, 1, 1]), (9, [1, 1, 1, 1])]
)
def test_top_k(k, correct):
    assert top_k_correct(LOGITS, LABELS, k=k).int().tolist() == correct
    assert top_k_accuracy(LOGITS, LABELS, k=k) == sum(correct) / 4


def by_hand(train, labels, test, *, classes, neighbours, temperature):
    winners = []
    for row in test.tolist():
        cosines = []
        for other, label in zip(train.tolist(), labels.tolist(), strict=True):
            product = sum(a * b for a, b in zip(row, other, strict=True))
            cosines.append((product / (math.hypot(*row) * math.hypot(*other)), label))
        votes = [0.0] * classes
        for cosine, label in sorted(cosines, reverse=True)[:neighbours]:
            votes[label] += math.exp(cosine / temperature)
        winners.append(votes.index(max(votes)))
    return winners


@pytest.mark.parametrize("neighbours", [1, 3, 10, 1000])
@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_neighbours_vote_by_similarity(neighbours, chunk, temperature):
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    test = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (30,), generator=generator)
    truth = torch.randint(3, (11,), generator=generator)
    winners = by_hand(
        train, labels, test, classes=3, neighbours=neighbours, temperature=temperature
    )
    accuracy = nearest_neighbour_accuracy(
        train,
        labels,
        test,
        truth,
        classes=3,
        neighbours=neighbours,
        temperature=temperature,
        chunk=chunk,
    )
    hits = sum(a == b for a, b in zip(winners, truth.tolist(), strict=True))
    assert accuracy == hits / 11


def test_a_near_neighbour_outvotes_two_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    accuracy = nearest_neighbour_accuracy(
        train,
        torch.tensor([0, 1, 1]),
        torch.tensor([[3.0, 1.0]]),
        torch.tensor([0]),
        classes=2,
        neighbours=3,
    )
    assert accuracy == 1.0


def test_small_temperatures_do_not_overflow():
    features = torch.eye(3)
    accuracy = nearest_neighbour_accuracy(
        features,
        torch.arange(3),
        features,
        torch.arange(3),
        classes=3,
        neighbours=3,
        temperature=1e-3,
    )
    assert accuracy == 1.0


def test_nothing_to_compare_is_refused():
    none, some = torch.empty(0, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match="0 features"):
        nearest_neighbour_accuracy(
            none, torch.empty(0).long(), some, torch.zeros(1).long(), classes=2, neighbours=1
        )
    with pytest.raises(ValueError, match="no image"):
        top_k_accuracy(none, torch.empty(0).long())
