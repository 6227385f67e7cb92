"""Points of docs/faithful.md that no other test holds; none of them needs stored values."""

import numpy as np
import pytest
import torch
from torch import nn

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import centre_draws, draw_views
from bigsimclr.data.loader import Batch
from bigsimclr.engine.step import compute_gradients
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.resnet import ShortcutPool
from bigsimclr.models.selective import SelectiveKernel
from bigsimclr.models.simclr import SimCLR
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single
from bigsimclr.recipe.schema import DistillRecipe, FinetuneRecipe, LinearRecipe
from bigsimclr.recipe.sections import (
    CropFlip,
    Distort,
    HeadSection,
    Lars,
    NtXentLoss,
    ResNetBackbone,
    Section,
    Sgd,
)
from bigsimclr.stages.distill import Distillation
from bigsimclr.stages.finetune import Classification

SMALL = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")


def network(*, seed: int = 0, backbone: ResNetBackbone = SMALL) -> SimCLR:
    architecture = Architecture(
        backbone=backbone, head=HeadSection(output_width=8), classes=4, from_layer=1
    )
    return build_model(architecture, seed=seed)


def batch(images: int = 8, side: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        pixels=torch.rand(images, 3, side, side, generator=generator),
        draws=centre_draws(ViewSettings(image_size=side), np.full((images, 2), side, np.int32)),
        labels=torch.arange(images) % 4,
        indices=torch.arange(images),
    )


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 34])
def test_selective_kernels_give_shallow_networks_the_resnet_d_parts_alone(depth: int) -> None:
    section = ResNetBackbone(depth=depth, width=1 / 16, selective_kernel=True)
    backbone = network(backbone=section).backbone
    modules = list(backbone.modules())
    assert not any(isinstance(module, SelectiveKernel) for module in modules)
    assert sum(isinstance(module, ShortcutPool) for module in modules) == 4
    assert sum(isinstance(module, nn.Conv2d) for module in backbone.conv1) == 3


def test_the_stem_for_small_images_is_one_convolution_with_selective_kernels_too() -> None:
    section = ResNetBackbone(depth=50, width=1 / 16, selective_kernel=True, stem="cifar")
    backbone = network(backbone=section).backbone
    assert backbone.conv1.kernel_size == (3, 3)
    assert backbone.conv1.stride == (1, 1)
    assert isinstance(backbone.layer1[0].downsample[0], ShortcutPool)
    assert isinstance(backbone.maxpool, nn.Identity)


def test_batch_norm_sees_one_micro_batch_at_a_time() -> None:
    trained, followed = network(), network()
    objective, pieces = Classification(trained, frozen=False), batch().split(4)
    compute_gradients(
        objective,
        batch(),
        how="accumulated",
        micro_batch=4,
        make_views=lambda piece: piece.pixels,
        strategy=Single(Precision(torch.device("cpu"), "fp32")),
    )
    followed.train()
    for piece in pieces:
        followed(piece.pixels)
    for name, buffer in followed.named_buffers():
        assert torch.equal(trained.get_buffer(name), buffer), name


# --- values that a recipe leaves out -------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (ResNetBackbone, "width", 1.0),
        (ResNetBackbone, "selective_kernel", False),
        (HeadSection, "layers", 3),
        (HeadSection, "output_width", 128),
        (NtXentLoss, "temperature", 0.1),
        (NtXentLoss, "queue", None),
        (Lars, "weight_decay", 1e-4),
        (Lars, "momentum", 0.9),
        (Lars, "trust_coefficient", 0.001),
        (Sgd, "momentum", 0.9),
        (CropFlip, "flip_probability", 0.5),
        (CropFlip, "eval_crop_proportion", 0.875),
        (CropFlip, "resize", "tf2"),
        (Distort, "colour_strength", 1.0),
        (Distort, "colour_probability", 0.8),
        (Distort, "grey_probability", 0.2),
        (Distort, "blur_probability", 0.5),
        (LinearRecipe, "from_layer", 0),
        (FinetuneRecipe, "from_layer", 1),
        (DistillRecipe, "temperature", 1.0),
        (DistillRecipe, "labelled_weight", 0.0),
    ],
)
def test_values_that_are_left_out(section: type[Section], key: str, value: object) -> None:
    assert section.model_fields[key].default == value


# --- augmentation --------------------------------------------------------------------------------


def test_the_whole_image_is_taken_where_no_crop_fits() -> None:
    sizes = np.array([[300, 4], [4, 300]], np.int32)  # no tenth of it is nearly square
    draws = draw_views(
        ViewSettings(image_size=32),
        seed=0,
        epochs=np.zeros(2, np.int64),
        indices=np.arange(2),
        sizes=sizes,
        views=2,
    )
    assert (draws.boxes == [[0, 0, 300, 4], [0, 0, 4, 300]]).all()


def test_grey_does_not_depend_on_the_strength_of_the_jitter() -> None:
    def grey(strength: float) -> np.ndarray:
        return draw_views(
            ViewSettings(
                image_size=8,
                colour_strength=strength,
                colour_probability=0.8,
                grey_probability=0.2,
            ),
            seed=0,
            epochs=np.zeros(100, np.int64),
            indices=np.arange(100),
            sizes=np.full((100, 2), 8, np.int32),
        ).grey

    assert grey(0.0).any()
    assert (grey(0.0) == grey(1.0)).all()


# --- what is trained -----------------------------------------------------------------------------


def test_either_the_whole_network_is_trained_or_the_classifier_alone() -> None:
    tuned, frozen = network(), network()
    assert Classification(tuned, frozen=False).model.training
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    Classification(frozen, frozen=True)
    assert not any(module.training for module in frozen.modules())
    moved = {name for name, value in frozen.named_parameters() if value.requires_grad}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_teacher_and_student_see_the_same_views_the_teacher_in_inference_mode() -> None:
    student, teacher = network(), network(seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = Distillation(student, teacher, temperature=2.0, labelled_weight=0.0)
    views = batch().pixels
    rows = objective.embed(views)
    rows.sum().backward()
    learnt, taught = rows.detach().chunk(2, dim=1)
    assert torch.equal(learnt, network().train()(views).logits)
    assert torch.equal(taught, network(seed=1).eval()(views).logits)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
