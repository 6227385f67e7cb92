"""NT-Xent against a slow reference written from the definition."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bigsimclr.losses import build_loss
from bigsimclr.losses.nt_xent import contrastive_metrics, nt_xent
from bigsimclr.recipe.sections import NtXentLoss


def reference(first, second, *, temperature, queue=None, normalise=True):
    """The definition, one anchor and one negative at a time, in float64."""
    views = [*first.double(), *second.double()]
    past = [] if queue is None else list(queue.double())
    if normalise:
        views = [view / view.norm() for view in views]
        past = [row / row.norm() for row in past]
    pairs = len(first)
    total = views[0].new_zeros(())
    for number, anchor in enumerate(views):
        partner = (number + pairs) % (2 * pairs)
        others = [v for i, v in enumerate(views) if i not in {number, partner}]
        logits = [anchor @ other / temperature for other in [views[partner], *others, *past]]
        total = total - torch.stack(logits).log_softmax(0)[0]
    return total / pairs


def rows(*shape, seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def pair(pairs, width, *, seed=0, scale=1.0, noise=1.0, dtype=torch.float64):
    first = rows(pairs, width, seed=seed, scale=scale, dtype=dtype)
    second = first + noise * rows(pairs, width, seed=seed + 1, scale=scale, dtype=dtype)
    return first, second


def value_and_gradients(loss, first, second, **settings):
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = loss(first, second, **settings)
    value.backward()
    return value.detach(), torch.cat([first.grad, second.grad])


def assert_near(found, expected, *, relative):
    limit = relative * float(expected.abs().max()) + 1e-300
    torch.testing.assert_close(found, expected, rtol=0, atol=limit, check_dtype=False)


@pytest.mark.parametrize("row_chunk", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("normalise", [True, False])
def test_value_and_gradient_are_those_of_the_definition(row_chunk, temperature, past, normalise):
    first, second = pair(5, 6)
    settings = {
        "temperature": temperature,
        "queue": rows(past, 6, seed=7) if past else None,
        "normalise": normalise,
    }
    expected, slope = value_and_gradients(reference, first, second, **settings)
    value, gradient = value_and_gradients(nt_xent, first, second, row_chunk=row_chunk, **settings)
    assert_near(value, expected, relative=1e-12)
    assert_near(gradient, slope, relative=1e-12)


@pytest.mark.parametrize("row_chunk", [None, 5])
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_well_aligned_views_keep_their_digits_in_float32(row_chunk, noise):
    # exp(-20): a difference of two logarithms near 10 would leave no digit of it in float32.
    first, second = pair(12, 64, noise=noise, dtype=torch.float32)
    expected, slope = value_and_gradients(
        reference, first.double(), second.double(), temperature=0.05
    )
    assert float(expected) < 1e-3
    value, gradient = value_and_gradients(
        nt_xent, first, second, temperature=0.05, row_chunk=row_chunk
    )
    assert_near(value, expected.float(), relative=2e-5)
    assert_near(gradient, slope.float(), relative=1e-4)


@pytest.mark.parametrize("row_chunk", [None, 3])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.1])
def test_a_single_pair_has_nothing_to_learn(row_chunk, temperature):
    first, second = pair(1, 4, dtype=torch.float32)
    value, gradient = value_and_gradients(
        nt_xent, first, second, temperature=temperature, row_chunk=row_chunk
    )
    assert value == 0
    assert not gradient.isnan().any()
    assert_near(gradient, torch.zeros(2, 4), relative=0)


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_small_temperatures_stay_finite_in_float32(row_chunk):
    first, second = pair(8, 16, noise=3.0, dtype=torch.float32)
    value, gradient = value_and_gradients(
        nt_xent, first, second, temperature=1e-3, row_chunk=row_chunk
    )
    expected, slope = value_and_gradients(
        reference, first.double(), second.double(), temperature=1e-3
    )
    assert_near(value, expected.float(), relative=1e-5)
    assert_near(gradient, slope.float(), relative=1e-3)


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_long_rows_without_normalisation(row_chunk):
    first, second = pair(6, 8, scale=100.0)
    settings = {"temperature": 0.1, "normalise": False}
    expected, slope = value_and_gradients(reference, first, second, **settings)
    value, gradient = value_and_gradients(nt_xent, first, second, row_chunk=row_chunk, **settings)
    assert_near(value, expected, relative=1e-12)
    assert_near(gradient, slope, relative=1e-12)


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_rows_of_zeros_are_allowed(row_chunk):
    first, second = pair(4, 8, dtype=torch.float32)
    first[1] = 0
    value, gradient = value_and_gradients(nt_xent, first, second, row_chunk=row_chunk)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_alike_projections_are_at_chance():
    same = torch.ones(7, 3, dtype=torch.float64)
    value = nt_xent(same, same, temperature=0.1, queue=torch.ones(5, 3).double())
    assert value.item() == pytest.approx(2 * math.log(2 * 7 - 1 + 5))


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_an_empty_queue_is_no_queue(row_chunk):
    first, second = pair(5, 4)
    with_queue = nt_xent(first, second, row_chunk=row_chunk, queue=torch.empty(0, 4))
    assert with_queue == nt_xent(first, second, row_chunk=row_chunk)


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_the_queue_takes_no_gradient(row_chunk):
    first, second = pair(5, 4)
    queue = rows(6, 4, seed=3).requires_grad_()
    first.requires_grad_()
    nt_xent(first, second, row_chunk=row_chunk, queue=queue).backward()
    assert queue.grad is None


@pytest.mark.parametrize("row_chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(row_chunk, dtype):
    first, second = pair(6, 8, dtype=torch.float32)
    first, second = first.to(dtype), second.to(dtype)
    value, gradient = value_and_gradients(nt_xent, first, second, row_chunk=row_chunk)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert value == nt_xent(first.float(), second.float(), row_chunk=row_chunk)


@pytest.mark.parametrize("row_chunk", [None, 4])
def test_autocast_changes_nothing(row_chunk):
    first, second = pair(6, 8, dtype=torch.float32)
    first.requires_grad_()
    plain = nt_xent(first, second, row_chunk=row_chunk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nt_xent(first, second, row_chunk=row_chunk)
    assert torch.equal(plain, cast)
    slopes = [torch.autograd.grad(loss, first)[0] for loss in (plain, cast)]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_chunks_have_no_second_derivative(temperature):
    first, second = pair(4, 4)
    first.requires_grad_()
    loss = nt_xent(first, second, temperature=temperature, row_chunk=3)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, first, create_graph=True)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_chunks_are_repeatable(temperature):
    first, second = pair(40, 8, dtype=torch.float32)
    runs = [
        value_and_gradients(nt_xent, first, second, temperature=temperature, row_chunk=16)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


class Largest(TorchFunctionMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_chunks_bound_the_memory(temperature):
    pairs, row_chunk, past = 64, 8, 32
    first, second = pair(pairs, 4)
    first.requires_grad_()
    with Largest() as largest:
        loss = nt_xent(
            first, second, temperature=temperature, row_chunk=row_chunk, queue=rows(past, 4, seed=5)
        )
    saved = [t for t in _saved_by(loss.grad_fn) if t is not None]
    assert largest.elements <= row_chunk * (2 * pairs + past)
    assert max(t.numel() for t in saved) <= 2 * pairs * 4


def _saved_by(function):
    found = list(getattr(function, "saved_tensors", ()))
    for parent, _ in function.next_functions:
        if parent is not None:
            found += _saved_by(parent)
    return found


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (((3, 4), (2, 4)), {}, "one shape"),
        (((0, 4), (0, 4)), {}, "non-empty"),
        (((3,), (3,)), {}, r"\[B, D\]"),
        (((3, 4), (3, 4)), {"temperature": 0.0}, "temperature"),
        (((3, 4), (3, 4)), {"row_chunk": 0}, "row_chunk"),
        (((3, 4), (3, 4)), {"queue": torch.ones(2, 5)}, "queue"),
    ],
)
def test_impossible_inputs_are_refused(shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(shapes[0]), torch.ones(shapes[1]), **settings)


def test_all_layers_of_a_head_are_refused():
    with pytest.raises(ValueError, match="not a tuple; a ProjectionHead returns those of every"):
        nt_xent((torch.ones(3, 4),), (torch.ones(3, 4),))


def test_the_kernels_want_a_gpu():
    program = """
import torch
from bigsimclr import nt_xent
nt_xent(torch.ones(3, 4), torch.ones(3, 4), fused="fp32")
"""
    # In a process of its own: whether Triton interprets is settled when it is first imported.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: fused NT-Xent needs projections on a GPU, not on cpu" in done.stderr


def test_metrics_compare_second_views_only():
    first, second = pair(9, 5, noise=2.0)
    logits = (
        (first / first.norm(dim=1, keepdim=True))
        @ (second / second.norm(dim=1, keepdim=True)).T
        / 0.2
    )
    hits = sum(int(row.argmax()) == number for number, row in enumerate(logits))
    share = logits.softmax(1)
    metrics = contrastive_metrics(first, second, temperature=0.2)
    assert 0 < hits < 9
    assert metrics.accuracy.item() == pytest.approx(hits / 9)
    assert metrics.entropy.item() == pytest.approx(
        float(-(share * share.log()).sum(1).mean()), rel=1e-6
    )


def test_metrics_in_blocks_are_the_same(monkeypatch):
    first, second = pair(9, 5, noise=2.0)
    whole = contrastive_metrics(first, second)
    monkeypatch.setattr("bigsimclr.losses.nt_xent.METRIC_ROWS", 4)
    blocks = contrastive_metrics(first, second)
    assert blocks.accuracy == whole.accuracy
    assert blocks.entropy.item() == pytest.approx(whole.entropy.item(), rel=1e-12)


def test_the_recipe_s_loss_binds_its_settings():
    first, second = pair(5, 4)
    queue = rows(3, 4, seed=3)
    loss = build_loss(NtXentLoss(temperature=0.3, row_chunk=4))
    assert loss(first, second, queue=queue) == nt_xent(
        first, second, temperature=0.3, row_chunk=4, queue=queue
    )
    metrics = loss.metrics(first, second)
    assert metrics.entropy == contrastive_metrics(first, second, temperature=0.3).entropy
