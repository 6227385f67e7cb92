"""Runs of the official code, and the same runs made by our stages' objectives and updates.

Of an official run the configuration, the initial weights, the views and the rates are taken; loss,
gradient, batch norm and optimizer are ours.
"""

import json
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.draws import centre_draws
from bigsimclr.data.loader import Batch
from bigsimclr.engine import Losses, Objective
from bigsimclr.engine.step import compute_gradients
from bigsimclr.interop.tf_checkpoint import import_checkpoint
from bigsimclr.interop.tf_names import from_official, official_names
from bigsimclr.losses import build_loss
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.fusing import fuse
from bigsimclr.models.simclr import SimCLR, parameter_kind
from bigsimclr.optim import build_optimizer
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.single import Single
from bigsimclr.recipe.plan import Plan, make_plan
from bigsimclr.recipe.schema import FinetuneRecipe, PretrainRecipe
from bigsimclr.recipe.sections import (
    BatchSection,
    CropFlip,
    Distort,
    HeadSection,
    LabelsSection,
    Lars,
    NtXentLoss,
    ResNetBackbone,
    ScheduleSection,
)
from bigsimclr.recipe.sources import DigitsData
from bigsimclr.stages.finetune import Classification
from bigsimclr.stages.pretrain import Contrast
from bigsimclr.world import ALONE
from tests.golden.paths import golden_dir

GOLDEN = golden_dir()
FOLDER = GOLDEN / "trajectory"
CPU = torch.device("cpu")
HEAD_KERNEL = "head_supervised/linear_layer/dense/kernel"
# Five times what the rounding of the official runs themselves changes is always allowed.
ROUNDING = 5

Arrays = dict[str, NDArray]
State = dict[str, Tensor]  # float64, by official variable name, in our layout


# --- the official run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Official:
    """One run of the official code."""

    name: str
    notes: dict  # the JSON file
    values: Arrays  # the NPZ file

    @property
    def finetunes(self) -> bool:
        return self.notes["mode"] == "finetune"

    @property
    def is_float64(self) -> bool:
        return self.notes.get("float64", False)

    def under(self, prefix: str) -> Arrays:
        found = (name for name in self.values if name.startswith(prefix))
        return {name.removeprefix(prefix): self.values[name] for name in found}

    def state(self, prefix: str) -> State:
        return in_our_layout(self.under(prefix))

    def views(self) -> NDArray:
        """uint8 [steps, B, H, W, 3 V]; a float64 run shares those of the float32 run beside it."""
        whole = self if "views_uint8" in self.values else read(self.name.removesuffix("_f64"))
        return whole.values["views_uint8"]

    def metric_tolerance(self, metric: str, step: int) -> float:
        own = self.notes["fp_sensitivity"]["metrics_max_abs_diff_per_step"][metric][step]
        return max(1e-7 if self.is_float64 else 1e-3, ROUNDING * own)

    def change_tolerances(self) -> tuple[float, float]:
        """Of the median and of the largest relative error of the variables' changes."""
        own = self.notes["fp_sensitivity"]["weights_delta_rel_diff"]["10"]
        least = (1e-5, 1e-5) if self.is_float64 else (2e-2, 5e-2)
        return max(least[0], ROUNDING * own["median"]), max(least[1], ROUNDING * own["max"])


@cache
def read(name: str) -> Official:
    notes = json.loads((FOLDER / f"{name}.json").read_text())
    return Official(name, notes, dict(np.load(FOLDER / f"{name}.npz")))


@cache
def initial(name: str) -> State:
    """Values of all variables before the first step."""
    official = read(name)
    own, text = official.state("init/"), official.notes.get("init_from", "")
    if found := re.search(r"ckpt_forward/(\w+)", text):
        model = import_checkpoint(GOLDEN / "ckpt_forward" / found[1] / "tf1").portable.model
        return renamed(model.state_dict(), official_names(model)) | own
    if found := re.search(r"final/ of .*?(\w+)\.npz", text):
        return read(found[1]).state("final/") | own
    if found := re.match(r"as (\w+)", text):
        return initial(found[1]) | own
    return own


def in_our_layout(arrays: Arrays) -> State:
    return {name: from_official(array).double() for name, array in arrays.items()}


# --- our run, all of it from the official configuration ------------------------------------------


def architecture_of(official: Official) -> Architecture:
    config, state = official.notes["cfg"], initial(official.name)
    layers = sum(bool(re.fullmatch(r"head_contrastive/nl_\d+/dense/kernel", n)) for n in state)
    from_layer = config["sel"] % (layers + 1)  # the official -1 is the last layer
    return Architecture(
        backbone=ResNetBackbone(
            depth=config["depth"],
            width=float(Fraction(*config["w"])),
            selective_kernel=config["sk"] > 0,
            stem="cifar" if config["size"] <= 32 else "imagenet",
        ),
        head=HeadSection(layers=layers, output_width=config["proj"]),
        classes=len(state[HEAD_KERNEL]),
        from_layer=from_layer,
        keep_head_layers=from_layer if official.finetunes else None,
    )


def recipe_of(official: Official) -> PretrainRecipe | FinetuneRecipe:
    config, architecture = official.notes["cfg"], architecture_of(official)
    common = {
        "data": DigitsData(kind="digits"),  # never opened: the views are given
        "optimizer": Lars(
            kind="lars",
            learning_rate=config["lr"],
            rate_scaling=config["scaling"],
            weight_decay=config["wd"],
        ),
        "schedule": ScheduleSection(epochs=config["epochs"], warmup_epochs=config["warmup"]),
        "batch": BatchSection(global_batch=config["bs"]),
    }
    if official.finetunes:
        return FinetuneRecipe(
            stage="finetune",
            augment=CropFlip(image_size=config["size"]),
            labels=LabelsSection(percent=100.0),
            from_layer=architecture.from_layer,
            **common,
        )
    return PretrainRecipe(
        stage="pretrain",
        augment=Distort(image_size=config["size"]),
        backbone=architecture.backbone,
        head=architecture.head,
        loss=NtXentLoss(temperature=config["T"]),
        **common,
    )


def plan_of(official: Official) -> Plan:
    return make_plan(recipe_of(official), examples=official.notes["num_examples"])


def network(official: Official) -> SimCLR:
    """Our network with the official initial weights; only a zero classifier is ours."""
    model = build_model(
        architecture_of(official),
        seed=0,
        probe=not official.finetunes,
        zero_classifier=official.finetunes,
    )
    state = initial(official.name)
    weights = {ours: state[theirs].float() for ours, theirs in official_names(model).items()}
    if official.finetunes:
        assert torch.equal(model.classifier.weight, weights["classifier.weight"])
        assert torch.equal(model.classifier.bias, weights["classifier.bias"])
    model.load_state_dict(weights)
    return model


def objective_of(
    official: Official, model: SimCLR, device: torch.device, *, fused: bool
) -> Objective:
    recipe = recipe_of(official)
    if isinstance(recipe, FinetuneRecipe):
        return Classification(model, frozen=False)
    loss, width = build_loss(recipe.loss, fused=fused), recipe.head.output_width
    world = replace(ALONE, device=device)
    return Contrast(model, loss, width=width, queue=None, world=world)


def batch_of(official: Official, step: int) -> Batch:
    """The views, uint8 [V, B, 3, H, W], and labels of one step."""
    images = official.views()[step]
    pixels = torch.from_numpy(np.stack(np.split(images, images.shape[-1] // 3, axis=-1)))
    sizes = np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1))
    return Batch(
        pixels=pixels.movedim(-1, 2),
        draws=centre_draws(ViewSettings(image_size=images.shape[1]), sizes),
        labels=torch.from_numpy(official.values["labels"][step]).long(),
        indices=torch.arange(len(images)),
    )


def official_losses(official: Official, losses: Losses, model: SimCLR) -> dict[str, float]:
    """What our objective returns under the official names; the head's decay is in our optimizer."""
    named = {
        "train/loss": "contrast_loss",
        "train/contrastive_accuracy": "contrast_acc",
        "train/contrastive_entropy": "contrast_entropy",
        "probe/loss": "supervised_loss",
        "probe/accuracy": "supervised_acc",
        "train/accuracy": "supervised_acc",
    }
    values = {named[name]: value.item() for name, value in losses.metrics.items()}
    if official.finetunes:
        values["supervised_loss"] = losses.total.item()
    half = official.notes["cfg"]["wd"] / 2
    values["weight_decay"] = half * model.classifier.weight.detach().square().sum().item()
    return values | {"total_loss": losses.total.item() + values["weight_decay"]}


@dataclass(frozen=True)
class Followed:
    """Our run beside an official one."""

    losses: list[dict[str, float]]  # per step, before its update
    gradients: State  # of the first step
    states: list[State]  # before the first step and after each


@cache
def follow(
    name: str,
    *,
    float64: bool | None = None,
    freezes_head: bool = False,
    device: torch.device = CPU,
    bf16: bool = False,
    fused: bool = False,  # in kernels of Triton
) -> Followed:
    """Train as the official run did, in its precision unless another is asked for."""
    official = read(name)
    recipe, plan, model = recipe_of(official), plan_of(official), network(official)
    dtype = torch.float64 if official.is_float64 or float64 else torch.float32
    if fused:
        fuse(model)
    objective = objective_of(official, model.to(dtype), device, fused=fused)
    if freezes_head:
        model.head.requires_grad_(requires_grad=False)
    names = official_names(model)
    strategy = Single(Precision(device, "bf16" if bf16 else "fp32"))
    kinds = parameter_kind(model)

    def make_views(batch: Batch) -> Tensor:
        # float32 first, as the official data pipeline does.
        views = batch.pixels.float() / torch.tensor(255, dtype=torch.float32)
        return views.flatten(0, 1).to(device, dtype)

    strategy.prepare(
        model,
        partial(
            build_optimizer,
            recipe.optimizer,
            kinds=kinds,
            learning_rate=plan.peak_learning_rate,
            fused=fused,
        ),
    )
    losses: list[dict[str, float]] = []
    gradients: State = {}
    states = [renamed(model.state_dict(), names)]
    for step, rate in enumerate(official.values["lr"].tolist()):
        strategy.set_learning_rate(rate)
        found = compute_gradients(
            objective,
            batch_of(official, step),
            how=plan.update,
            micro_batch=plan.micro_batch,
            make_views=make_views,
            strategy=strategy,
        )
        losses.append(official_losses(official, found, model))
        if step == 0:
            reached = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            gradients = renamed(reached, names)
        strategy.update()
        states.append(renamed(model.state_dict(), names))
    return Followed(losses, gradients, states)


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> State:
    """Copies on the host by official name; the model goes on in place."""
    return {names[n]: tensor.to(CPU, torch.float64, copy=True) for n, tensor in tensors.items()}
