"""The finite check and the fp16 loss scale of a single process."""

import math
from functools import partial

import pytest
import torch

from bigsimclr.errors import NumericsError
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.layers import Convolution, Dense
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel import build_strategy
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single
from bigsimclr.recipe.sections import Lars, ResNetBackbone
from bigsimclr.recipe.strategies import ParallelSection
from bigsimclr.world import ALONE


def prepared(precision: str, device: str = "cpu") -> tuple[Single, SimCLR]:
    backbone = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")
    model = build_model(Architecture(backbone, None, 3, 0), seed=0)
    strategy = Single(Precision(torch.device(device), precision))
    strategy.prepare(model, lambda own, **_: torch.optim.SGD(own.values(), lr=0.1))
    return strategy, model


def loss_of(model: SimCLR, factor: float) -> torch.Tensor:
    device = next(model.parameters()).device
    logits = model(torch.full((2, 3, 8, 8), 0.5, device=device)).logits
    assert logits is not None
    return logits.square().sum() * factor


def test_a_non_finite_gradient_stops_before_the_update() -> None:
    strategy, model = prepared("fp32")
    before = {name: p.clone() for name, p in model.named_parameters()}
    strategy.backward(loss_of(model, math.inf))
    with pytest.raises(NumericsError, match="gradient norm is"):
        strategy.update()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_update_returns_the_norm_and_clears_the_gradients() -> None:
    strategy, model = prepared("fp32")
    strategy.backward(loss_of(model, 1.0))
    total = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    update = strategy.update()
    assert update.gradient_norm.item() == pytest.approx(math.sqrt(total.item()), rel=1e-5)
    assert not update.skipped
    assert all(p.grad is None for p in model.parameters())


def test_fp16_overflow_skips_the_update_and_lowers_the_scale() -> None:
    strategy, model = prepared("fp16")
    before = {name: p.clone() for name, p in model.named_parameters()}
    strategy.backward(loss_of(model, 1e38))
    scale = strategy.state()["scale"]
    assert strategy.update().skipped
    assert strategy.state()["scale"] == scale / 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_loss_scale_survives_a_restart() -> None:
    strategy, model = prepared("fp16")
    for factor in (1e38, 1.0, 1.0):
        strategy.backward(loss_of(model, factor))
        strategy.update()
    state = strategy.state()
    again, _ = prepared("fp16")
    again.restore(dict(state))
    assert again.state() == state
    assert state["finite_updates"] == 2


@pytest.mark.gpu
def test_the_gpu_reports_a_non_finite_gradient_with_the_next_update() -> None:
    strategy, model = prepared("fp32", "cuda")
    strategy.backward(loss_of(model, math.inf))
    strategy.update()
    strategy.backward(loss_of(model, 1.0))
    with pytest.raises(NumericsError, match="gradient norm is"):
        strategy.update()


@pytest.mark.parametrize("name", ["ddp", "zero1", "fsdp2"])
def test_one_rank_shares_nothing(name: str) -> None:
    section = ParallelSection(strategy=name, device="cpu")
    assert isinstance(build_strategy(section, ALONE), Single)


def updates(precision: str, *, rounds_weights: bool) -> list[torch.Tensor]:
    """Weights after three updates in 16 bits, with and without copies to work with."""
    backbone = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")
    model = build_model(Architecture(backbone, None, 3, 0), seed=0)
    strategy = Single(Precision(torch.device("cpu"), precision))
    lars = Lars(kind="lars", learning_rate=0.1, rate_scaling="none")
    make = partial(build_optimizer, lars, kinds=parameter_kind(model), learning_rate=0.1)
    strategy.prepare(model, make)
    # Copies must follow what is loaded, too.
    saved = {name: tensor.clone() for name, tensor in next(iter(strategy.whole())).items()}
    moments = strategy.optimizer_part(lambda *_: True)
    for factor in (1.5, 1.0):
        strategy.load({name: tensor * factor for name, tensor in saved.items()}, moments)
    if not rounds_weights:
        for module in model.modules():
            if isinstance(module, Convolution | Dense):
                module.working = None
        strategy.refresh = lambda: None
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.rand(4, 3, 8, 8, generator=generator)
        with strategy.compute():
            logits = model(images).logits
        assert logits is not None
        strategy.backward(1e-3 * (logits.float() - 1).square().mean())
        assert not strategy.update().skipped
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_working_copies_are_those_of_autocast(precision: str) -> None:
    ours, theirs = (updates(precision, rounds_weights=rounds) for rounds in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    exact = prepared("fp32")[1]
    assert not any(m.working is not None for m in exact.modules() if isinstance(m, Convolution))


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_working_copies_that_the_optimizer_writes(precision: str) -> None:
    backbone = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")
    model = build_model(Architecture(backbone, None, 3, 0), seed=0)
    strategy = Single(Precision(torch.device("cpu"), precision))
    lars = Lars(kind="lars", learning_rate=0.1, rate_scaling="none")
    kinds = parameter_kind(model)
    strategy.prepare(
        model, partial(build_optimizer, lars, kinds=kinds, learning_rate=0.1, fused=True)
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with strategy.compute():
        logits = model(images).logits
    assert logits is not None
    strategy.backward(1e-3 * (logits.float() - 1).square().mean())
    strategy.update()
    assert not torch.equal(model.backbone.conv1.weight, before["backbone.conv1.weight"])
    for module in model.modules():
        if isinstance(module, Convolution | Dense):
            assert module.working is not None
            rounded = module.weight.to(module.working.dtype)
            # The interpreter cuts bfloat16 off where a GPU rounds: the last bit may differ.
            slack = 2**-7 * rounded.abs().float() if precision == "bf16" else 0.0
            assert ((module.working.float() - rounded.float()).abs() <= slack).all()
