"""Warm-up and cosine."""

import pytest

from bigsimclr.optim.schedule import warmup_cosine


def test_warm_up_is_linear_from_zero():
    factors = [warmup_cosine(step, warmup_steps=4, total_steps=12) for step in range(5)]
    assert factors == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_to_zero_at_the_total():
    assert warmup_cosine(8, warmup_steps=4, total_steps=12) == pytest.approx(0.5)
    assert 0 < warmup_cosine(11, warmup_steps=4, total_steps=12) < 0.05
    assert warmup_cosine(12, warmup_steps=4, total_steps=12) == pytest.approx(0.0, abs=1e-16)
    assert warmup_cosine(40, warmup_steps=4, total_steps=12) == pytest.approx(0.0, abs=1e-16)


def test_without_warm_up_it_starts_at_the_top():
    assert warmup_cosine(0, warmup_steps=0, total_steps=5) == 1.0


def test_nothing_but_warm_up():
    factors = [warmup_cosine(step, warmup_steps=3, total_steps=3) for step in range(3)]
    assert factors == pytest.approx([0, 1 / 3, 2 / 3])
