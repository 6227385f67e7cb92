"""The fused LARS against the plain one in float64, over several steps and groups."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bigsimclr.kernels.lars import TILES
from bigsimclr.kernels.lars_update import LarsUpdate
from bigsimclr.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from bigsimclr.optim.lars import LARS
from bigsimclr.recipe.sections import Lars, Sgd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = [0.0, 0.5, 0.5, 0.3]
TRUST = 0.02
TOLERANCE = 2e-6
"""Of the largest value of a tensor, which may be its only one: there 7e-7 was measured."""

GROUPS = [
    {"weight_decay": 0.01, "adapt": True},
    {"weight_decay": 0.0, "adapt": False},
    {"weight_decay": 0.03, "adapt": False},
    {"weight_decay": 0.0, "adapt": True},
]
# One, less than a chunk, whole chunks, a value more; channels_last; nothing at all.
SHAPES = [(1,), (5, 7), (TILES.chunk,), (2 * TILES.chunk + 1,), (8, 16, 3, 3), (0,), (4, 1, 1, 1)]


def tensors(seed: int) -> list[Tensor]:
    """Values of float32 for every group, those of four dimensions channels_last."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator) for _ in GROUPS for shape in SHAPES]
    return [
        t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
        for t in (t.to(DEVICE) for t in made)
    ]


def grouped(parameters: list[Parameter]) -> list[dict]:
    size = len(SHAPES)
    return [
        {"params": parameters[size * number : size * (number + 1)], **group}
        for number, group in enumerate(GROUPS)
    ]


def trained(dtype: torch.dtype, *, fused: bool, **settings) -> dict[str, list[Tensor]]:
    """Weights and momenta after steps, of which a zero weight, gradient, and none are part."""
    weights = tensors(1)
    weights[0].zero_()
    parameters = [Parameter(weight.to(dtype)) for weight in weights]
    settings = {"trust_coefficient": TRUST, **settings}
    optimizer = LARS(grouped(parameters), learning_rate=1.0, fused=fused, **settings)
    for step, rate in enumerate(RATES):
        set_learning_rate(optimizer, rate)
        for parameter, gradient in zip(parameters, tensors(100 + step), strict=True):
            parameter.grad = gradient.to(dtype)
        parameters[1].grad = None
        if step == 2:
            parameters[2].grad.zero_()
        optimizer.step()
    momenta = [optimizer.state[parameter]["momentum"] for parameter in parameters]
    return {"weights": [p.detach() for p in parameters], "momenta": momenta}


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert all(f.shape == e.shape for f, e in zip(found, expected, strict=True))
    errors = [
        float((f.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30))
        for f, e in zip(found, expected, strict=True)
        if e.numel()
    ]
    return max(errors)


@pytest.mark.parametrize("classic", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_plain_update(classic: bool, nesterov: bool, momentum: float) -> None:
    settings = {"classic": classic, "nesterov": nesterov, "momentum": momentum}
    found = trained(torch.float32, fused=True, **settings)
    expected = trained(torch.float64, fused=False, **settings)
    for name in expected:
        error = largest_error(found[name], expected[name])
        print(f"{name}: {error:.1e}")
        assert error <= TOLERANCE
    assert torch.equal(found["weights"][1], tensors(1)[1])  # it had no gradient
    assert not found["momenta"][1].any()


def test_it_repeats_itself_to_the_bit() -> None:
    first, second = (trained(torch.float32, fused=True) for _ in range(2))
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


@pytest.mark.parametrize(
    "section", [Lars(kind="lars", learning_rate=1.0), Sgd(kind="sgd", learning_rate=1.0)]
)
def test_a_state_of_plain_steps_is_taken_over(section: Lars | Sgd) -> None:
    kinds = {"a": "kernel", "b": "bias", "c": "norm", "d": "classifier_kernel"}
    results = []
    for fused in (False, True):
        named = {n: Parameter(t) for n, t in zip(kinds, tensors(1)[1:], strict=False)}
        state: dict[str, Tensor] = {}
        for step, is_fused in enumerate([False, fused, fused]):
            optimizer = build_optimizer(
                section, named, kinds=kinds, learning_rate=0.1, fused=is_fused
            )
            if state:
                load_optimizer_state(optimizer, state)
            for parameter, slope in zip(named.values(), tensors(7 + step)[1:], strict=False):
                parameter.grad = slope
            optimizer.step()
            state = optimizer_state(optimizer)
        results.append([*(p.detach() for p in named.values()), *state.values()])
    assert largest_error(results[1], results[0]) <= TOLERANCE


def test_other_settings_of_a_group_hold_from_the_next_step() -> None:
    results = []
    for dtype, fused in ((torch.float32, True), (torch.float64, False)):
        parameter = Parameter(tensors(1)[1].to(dtype))
        optimizer = LARS([{"params": [parameter], **GROUPS[0]}], learning_rate=0.5, fused=fused)
        for step, changed in enumerate(GROUPS):
            optimizer.param_groups[0].update(changed)
            optimizer.param_groups[0]["lr"] = 0.1 * step
            parameter.grad = tensors(100 + step)[1].to(dtype)
            optimizer.step()
        results.append(parameter.detach())
    assert largest_error(results[:1], results[1:]) <= TOLERANCE


def test_float64_takes_the_plain_path() -> None:
    plain = trained(torch.float64, fused=False)
    asked = trained(torch.float64, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(asked["weights"], plain["weights"], strict=True))


def test_a_nan_stays_where_the_plain_update_leaves_it() -> None:
    results = []
    for fused in (False, True):
        parameters = [Parameter(t) for t in tensors(1)[1:4]]
        optimizer = LARS([{"params": parameters, **GROUPS[0]}], learning_rate=0.5, fused=fused)
        for parameter, gradient in zip(parameters, tensors(2)[1:4], strict=True):
            parameter.grad = gradient
        parameters[1].grad[5] = torch.nan
        optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert [int(weights.isnan().sum()) for weights in results[1]] == [0, 1, 0]
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("fused", [True, False])
def test_squared_norms_may_be_summed_over_shards(fused: bool) -> None:
    def both(own: list[Tensor]) -> list[Tensor]:
        # The other rank holds as much: parts are the same, so that each whole is sqrt 2 longer.
        return [2 * tensor.square().sum() for tensor in own]

    part, slope = tensors(1)[3], tensors(2)[3]
    whole = Parameter(torch.cat([part, part]).double())
    whole.grad = torch.cat([slope, slope]).double()
    shard, empty = Parameter(part.clone()), Parameter(part[:0].clone())
    shard.grad, empty.grad = slope, slope[:0]
    LARS([{"params": [whole], **GROUPS[0]}], learning_rate=0.5).step()
    group = {"params": [empty, shard], **GROUPS[0]}
    LARS([group], learning_rate=0.5, squared_norms=both, fused=fused).step()
    assert largest_error([shard.detach()], [whole.detach()[: len(part)]]) <= TOLERANCE


def update_of(weights: list[Tensor], **settings) -> LarsUpdate:
    return LarsUpdate(
        weights,
        weight_decays=[0.01] * len(weights),
        adapts=[True] * len(weights),
        momentum=0.9,
        trust_coefficient=TRUST,
        **settings,
    )


def step_of(weights: list[Tensor], gradients: list[Tensor], **more) -> list[Tensor]:
    """Momenta after one step."""
    momenta = [torch.zeros_like(weight) for weight in weights]
    rate = torch.tensor(0.5, device=DEVICE)
    update_of(weights).update(
        weights=weights, gradients=gradients, momenta=momenta, rates=[rate] * len(weights), **more
    )
    return momenta


def test_gradients_of_several_types_and_working_copies() -> None:
    weights, slopes = tensors(1)[1:5], tensors(2)[1:5]
    types = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    gradients = [slope.to(dtype) for slope, dtype in zip(slopes, types, strict=True)]
    working = [None, *(torch.zeros_like(w, dtype=torch.bfloat16) for w in weights[1:])]
    exact = [Parameter(weight.double()) for weight in weights]
    for parameter, gradient in zip(exact, gradients, strict=True):
        parameter.grad = gradient.double()
    LARS([{"params": exact, **GROUPS[0]}], learning_rate=0.5, trust_coefficient=TRUST).step()
    step_of(weights, gradients, working=working)
    assert largest_error(weights, [parameter.detach() for parameter in exact]) <= TOLERANCE
    for copy, weight in zip(working[1:], weights[1:], strict=True):
        assert copy.stride() == weight.stride()
        # Triton's interpreter cuts off what a GPU rounds.
        limit = 0.0 if DEVICE == "cuda" else 2.0**-7
        torch.testing.assert_close(copy, weight.to(torch.bfloat16), rtol=limit, atol=0)


def test_a_gradient_in_another_layout_is_the_same_gradient() -> None:
    slope = tensors(2)[4]
    results = []
    for gradient in (slope, slope.contiguous()):
        weight = tensors(1)[4]
        results.append([weight, *step_of([weight], [gradient])])
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert slope.stride() != slope.contiguous().stride()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("start", [0, 1, 4])
def test_tensors_may_begin_anywhere(start: int) -> None:
    """As parts of a longer one do; only from some addresses is memory moved in vectors."""
    size = TILES.chunk + 16
    weight, gradient = (tensors(seed)[3][start : start + size] for seed in (1, 2))
    exact = Parameter(weight.double())
    exact.grad = gradient.double()
    LARS([{"params": [exact], **GROUPS[0]}], learning_rate=0.5, trust_coefficient=TRUST).step()
    beyond = weight._base[start + size :].clone()
    momenta = step_of([weight], [gradient])
    assert largest_error([weight], [exact.detach()]) <= TOLERANCE
    assert largest_error(momenta, [tensors(1)[3][start : start + size] - exact.detach()]) <= 1e-4
    assert torch.equal(weight._base[start + size :], beyond)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": torch.ones(6, 5, device=DEVICE).T}, "contiguous or channels_last"),
        ({"weights": torch.ones(5, 6, device=DEVICE).double()}, "weight 0 is torch.float64"),
        ({"momenta": torch.ones(6, 5, device=DEVICE).T}, "momentum 0 is torch.float32"),
        ({"working": torch.ones(5, 6, device=DEVICE)}, "working copy 0 is torch.float32"),
        ({"gradients": torch.ones(5, 6, device=DEVICE).double()}, "a gradient is torch.float64"),
        ({"gradients": torch.ones(4, 6, device=DEVICE)}, "of 24 values"),
        ({"momenta": torch.ones(4, 6, device=DEVICE)}, "of 24 values"),
    ],
)
def test_what_would_be_misread_is_refused(wrong: dict[str, Tensor], message: str) -> None:
    tensor = torch.ones(5, 6, device=DEVICE)
    given = {"weights": tensor, "gradients": tensor, "momenta": tensor, **wrong}
    lists = {name: [value] for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        update_of(lists["weights"]).update(**lists, rates=[torch.tensor(1.0, device=DEVICE)])


def followed(*, captured: bool, classic: bool) -> list[Tensor]:
    """Weights after steps, some of them captured, whose gradients are made at new addresses."""
    parameters = [Parameter(weight) for weight in tensors(1)]
    optimizer = LARS(grouped(parameters), learning_rate=0.5, classic=classic, fused=True)
    inputs = tensors(2)

    def step() -> None:
        for parameter, values in zip(parameters, inputs, strict=True):
            parameter.grad = values * 2.0
        optimizer.step()

    step()
    again = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        again = graph.replay
    for number, rate in enumerate([0.3, 0.1, 0.2]):
        set_learning_rate(optimizer, rate)
        for values, new in zip(inputs, tensors(10 + number), strict=True):
            values.copy_(new)
        again()
        if number == 1:
            step()  # with gradients elsewhere, between two replays
    return [parameter.detach() for parameter in parameters]


@pytest.mark.gpu
@pytest.mark.parametrize("classic", [True, False])
def test_a_captured_step_follows_rates_and_gradients(classic: bool) -> None:
    found = followed(captured=True, classic=classic)
    expected = followed(captured=False, classic=classic)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_in_another_order_is_followed() -> None:
    steps = []
    for turned in (False, True):
        weights = [torch.full((3 + n,), 1.0 + n, device=DEVICE).requires_grad_() for n in range(3)]
        optimizer = LARS([{"params": weights, "adapt": False}], learning_rate=0.1, fused=True)
        if turned:
            state = dict(reversed(list(optimizer.state.items())))
            optimizer.state.clear()
            optimizer.state.update(state)
        for factor in (1.0, 2.0):
            for number, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, factor * (1 + number))
            optimizer.step()
        steps.append([weight.detach().clone() for weight in weights])
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))
