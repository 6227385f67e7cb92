"""Cached and accumulated gradients against the direct step, in float64."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import draw_views
from bigsimclr.data.loader import Batch
from bigsimclr.engine import Objective
from bigsimclr.engine.step import compute_gradients
from bigsimclr.losses import build_loss
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.simclr import SimCLR
from bigsimclr.optim.tensors import tensors_of
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single
from bigsimclr.recipe.sections import HeadSection, NtXentLoss, QueueSection, ResNetBackbone
from bigsimclr.stages.distill import Distillation
from bigsimclr.stages.finetune import Classification
from bigsimclr.stages.pretrain import Contrast
from bigsimclr.world import ALONE

IMAGES, SIZE, CLASSES = 14, 8, 3  # 14 images make exactly 2, 3 and 7 pieces
BACKBONE = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")
SETTINGS = ViewSettings(
    image_size=SIZE,
    crop_area=(0.3, 1.0),
    flip_probability=0.5,
    resize="tf2",
    eval_crop_proportion=1.0,
)


def batch_of(views: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    indices = np.arange(IMAGES, dtype=np.int64)
    draws = draw_views(
        SETTINGS,
        seed=1,
        epochs=np.zeros(IMAGES, dtype=np.int64),
        indices=indices,
        sizes=np.full((IMAGES, 2), SIZE, dtype=np.int32),
        views=views,
    )
    labels = torch.arange(IMAGES) % CLASSES
    return Batch(pixels=pixels, draws=draws, labels=labels, indices=torch.from_numpy(indices))


def views64(batch: Batch, *, views: int) -> Tensor:
    """Random but per-image views, so that a mix-up of rows between pieces would show."""
    base = batch.pixels.double() / 255
    shifted = [base * (1 - 0.2 * v) + 0.05 * v * base.flip(-1) for v in range(views)]
    return torch.cat(shifted)


def network(*, classes: int | None, statistics: bool, seed: int = 0, probe: bool = False) -> SimCLR:
    architecture = Architecture(
        backbone=BACKBONE,
        head=HeadSection(layers=3, output_width=16),
        classes=classes,
        from_layer=0,
    )
    model = build_model(architecture, seed=seed, probe=probe).double()
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.train(mode=statistics)
    return model


def freeze_statistics(model: SimCLR) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()


def contrast(*, queue: bool = False, probe: bool = True) -> Contrast:
    model = network(classes=CLASSES if probe else None, statistics=False, probe=True)
    objective = Contrast(
        model,
        build_loss(NtXentLoss(temperature=0.2)),
        width=16,
        queue=QueueSection(length=16, ema_decay=0.9) if queue else None,
        world=ALONE,
    )
    freeze_statistics(model)
    if objective._averaged is not None:
        freeze_statistics(objective._averaged.model)
    return objective


def gradients(
    make: Callable[[], Objective], how: str, pieces: int, *, views: int
) -> tuple[float, dict[str, Tensor]]:
    objective = make()
    strategy = Single(Precision(torch.device("cpu"), "fp32"))
    micro_batch = -(-IMAGES // pieces)
    assert len(batch_of(views).split(micro_batch)) == pieces
    losses = compute_gradients(
        objective,
        batch_of(views),
        how=how,
        micro_batch=micro_batch,
        make_views=partial(views64, views=views),
        strategy=strategy,
    )
    named = objective.model.named_parameters()
    return losses.total.item(), {n: p.grad for n, p in named if p.grad is not None}


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_cached_gradients_equal_the_direct_step(pieces: int, probe: bool) -> None:
    direct_loss, direct = gradients(lambda: contrast(probe=probe), "direct", 1, views=2)
    cached_loss, cached = gradients(lambda: contrast(probe=probe), "cached", pieces, views=2)
    assert cached_loss == pytest.approx(direct_loss, rel=1e-12)
    assert cached.keys() == direct.keys()
    assert len(direct) > 20
    for name, gradient in direct.items():
        scale = gradient.abs().max().clamp(min=1e-30)
        assert ((cached[name] - gradient).abs().max() / scale).item() < 1e-11, name
    largest = max(g.abs().max().item() for g in direct.values())
    worst = max((cached[n] - g).abs().max().item() for n, g in direct.items())
    assert worst <= 1e-12 * max(1.0, largest)


def test_the_probe_gives_the_features_no_gradient() -> None:
    _, blind = gradients(lambda: contrast(probe=False), "direct", 1, views=2)
    _, probed = gradients(lambda: contrast(probe=True), "direct", 1, views=2)
    assert probed.keys() - blind.keys() == {"classifier.weight", "classifier.bias"}
    assert probed["classifier.weight"].abs().max() > 0
    for name, gradient in blind.items():
        torch.testing.assert_close(probed[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_accumulated_gradients_equal_the_direct_step(pieces: int) -> None:
    def make() -> Classification:
        objective = Classification(network(classes=CLASSES, statistics=False), frozen=False)
        freeze_statistics(objective.model)
        return objective

    direct_loss, direct = gradients(make, "direct", 1, views=1)
    summed_loss, summed = gradients(make, "accumulated", pieces, views=1)
    assert summed_loss == pytest.approx(direct_loss, rel=1e-12)
    for name, gradient in direct.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("how", "weight"), [("accumulated", 0.0), ("cached", 0.3)])
def test_distillation_in_pieces_equals_the_direct_step(how: str, weight: float) -> None:
    def make() -> Distillation:
        teacher = network(classes=CLASSES, statistics=False, seed=7)
        objective = Distillation(
            network(classes=CLASSES, statistics=False),
            teacher,
            temperature=2.0,
            labelled_weight=weight,
        )
        freeze_statistics(objective.model)
        return objective

    direct_loss, direct = gradients(make, "direct", 1, views=1)
    pieces_loss, pieces = gradients(make, how, 3, views=1)
    assert pieces_loss == pytest.approx(direct_loss, rel=1e-12)
    for name, gradient in direct.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-10, atol=1e-13)


def test_a_contrastive_loss_refuses_accumulation() -> None:
    with pytest.raises(ValueError, match="cached"):
        gradients(contrast, "accumulated", 3, views=2)


def test_the_first_pass_moves_no_running_statistics() -> None:
    def after(how: str, pieces: int) -> dict[str, Tensor]:
        objective = contrast()
        objective.model.train()
        compute_gradients(
            objective,
            batch_of(2),
            how=how,
            micro_batch=IMAGES // pieces,
            make_views=partial(views64, views=2),
            strategy=Single(Precision(torch.device("cpu"), "fp32")),
        )
        return {n: b.clone() for n, b in objective.model.named_buffers()}

    direct, cached = after("direct", 1), after("cached", 1)
    assert any("running_mean" in name for name in direct)
    for name, buffer in direct.items():
        torch.testing.assert_close(cached[name], buffer, rtol=1e-12, atol=1e-14)


def test_the_queue_adds_negatives_and_is_filled_in_batch_order() -> None:
    whole, split = contrast(queue=True), contrast(queue=True)
    make_views = partial(views64, views=2)
    batch = batch_of(2)
    before, _ = whole.loss(whole.embed(make_views(batch)), batch), None
    whole.after_update([batch], make_views, iter([tensors_of(whole.model)]))
    split.after_update(batch.split(5), make_views, iter([tensors_of(split.model)]))
    for name, tensor in whole.state()["queue"].items():
        torch.testing.assert_close(split.state()["queue"][name], tensor)
    after = whole.loss(whole.embed(make_views(batch)), batch)
    assert after.total.item() > before.total.item()
