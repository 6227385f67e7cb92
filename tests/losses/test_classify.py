"""Cross-entropy with hidden labels, and distillation."""

import math

import pytest
import torch

from bigsimclr.losses.classify import cross_entropy, distillation


def logits(count, classes, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator, dtype=dtype)


def test_cross_entropy_is_the_mean_over_shown_labels():
    scores = logits(5, 3).requires_grad_()
    labels = torch.tensor([2, -1, 0, -7, 1])
    shown = [(0, 2), (2, 0), (4, 1)]
    expected = -sum(scores[i].log_softmax(0)[label] for i, label in shown) / 3
    loss = cross_entropy(scores, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not scores.grad[[1, 3]].any()
    assert scores.grad[[0, 2, 4]].any(1).all()


def test_cross_entropy_without_any_label_is_zero_with_zero_gradient():
    scores = logits(3, 4).requires_grad_()
    loss = cross_entropy(scores, torch.full((3,), -1))
    loss.backward()
    assert loss == 0
    assert torch.equal(scores.grad, torch.zeros(3, 4).double())


def test_cross_entropy_of_half_precision_is_float32():
    scores = logits(4, 3).bfloat16()
    loss = cross_entropy(scores, torch.tensor([0, 1, 2, 0]))
    assert loss.dtype == torch.float32
    assert loss == cross_entropy(scores.float(), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_distillation_is_cross_entropy_with_soft_classes(temperature):
    student, teacher = logits(4, 3, seed=1), logits(4, 3, seed=2)
    expected = 0.0
    for own, other in zip(student, teacher, strict=True):
        weights = [math.exp(float(value) / temperature) for value in other]
        log_share = (own / temperature).log_softmax(0)
        expected -= sum(
            weight / sum(weights) * float(value)
            for weight, value in zip(weights, log_share, strict=True)
        )
    loss = distillation(student, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * expected / 4, rel=1e-12)


def test_distillation_is_least_where_the_student_agrees():
    teacher = logits(6, 5)
    agreed = teacher.clone().requires_grad_()
    loss = distillation(agreed, teacher, temperature=2.0)
    loss.backward()
    entropy = torch.distributions.Categorical(logits=teacher / 2.0).entropy().mean()
    assert loss.item() == pytest.approx(4.0 * entropy.item(), rel=1e-12)
    assert agreed.grad.abs().max() < 1e-15


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(4, 3).requires_grad_(), logits(4, 3, seed=1).requires_grad_()
    distillation(student, teacher, temperature=1.0).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "temperature"),
    [((2, 3), (2, 4), 1.0), ((3,), (3,), 1.0), ((2, 3), (2, 3), 0.0)],
)
def test_impossible_inputs_are_refused(student, teacher, temperature):
    with pytest.raises(ValueError, match=r"expected|positive"):
        distillation(torch.ones(student), torch.ones(teacher), temperature=temperature)
