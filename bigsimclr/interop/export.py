"""Networks as weights for torchvision's and timm's ResNets.

Our parameter names are theirs already. What else differs is refused, or told in the notes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.interop import PortableModel, Preprocessing
from bigsimclr.interop.model_file import write_tensors
from bigsimclr.models import Architecture, restore_model
from bigsimclr.models.anatomy import DEPTHS
from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.simclr import Outputs, SimCLR
from bigsimclr.randomness import philox, uniform
from bigsimclr.recipe.sections import ResNetBackbone

Library = Literal["torchvision", "timm"]

_SAMPLES: Final = 2
_CELLS: Final = 16
"""Random colours along each side of a sample image."""
_CODE: Final = "    "
# The window that hangs over the end is the padding at the end.
_POOL: Final = "model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)"


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what there is to know about it."""

    path: Path
    notes: tuple[str, ...]  # lines for the user; those that start with four spaces are Python


def export_names(portable: PortableModel, path: Path, *, to: Library) -> Exported:
    """Write a ResNet under the names and shapes that torchvision's or timm's ResNet has.

    The file holds the backbone, and as `fc` the classifier if it reads the features; its metadata
    hold the input convention (`input`, JSON), `classes` (JSON) and `origin`. The notes hold the
    Python lines that load it with every name matched, and how far outputs move without the one
    among them that replaces the stem's max-pool.

    Args:
        portable: the network; it is not changed.
        path: the `.safetensors` file to write; must not exist yet.
        to: whose model will load the file.

    Raises:
        RecipeError: that library has no such network, or the name does not end in .safetensors.
        CheckpointError: the network's outputs are not finite.
        StorageError: the file is there already, or cannot be written.

    Source: torchvision 0.29 models/resnet.py, timm 1.0 models/resnet.py.
    """
    architecture = portable.architecture
    obstacles = _obstacles(architecture.backbone, to)
    if obstacles:
        raise RecipeError(
            f"{to} has no such network: {'; '.join(obstacles)}; use --to safetensors or --to onnx"
        )
    notes = (
        *_input_notes(portable.preprocessing, to),
        *_omissions(portable, to),
        *_differences(portable, to),
        "to load it, every name matched:",
        *(f"{_CODE}{line}" for line in _loading(portable, path, to)),
    )
    write_tensors(path, _renamed(portable), _metadata(portable))
    return Exported(path, notes)


def _obstacles(backbone: ResNetBackbone, to: Library) -> list[str]:
    """Say why the library's ResNets cannot hold this backbone's weights."""
    obstacles = []
    if backbone.selective_kernel:
        obstacles.append(
            "torchvision has no selective kernels"
            if to == "torchvision"
            else "timm's selective kernels are other blocks behind another stem"
        )
    if backbone.stem == "cifar":
        obstacles.append("its stem is 7x7 with a max-pool, not the CIFAR stem")
    if backbone.width != 1:
        obstacles.append(
            f"width {backbone.width:g} multiplies every channel count, while its wide ResNets "
            "widen the inner convolutions only"
        )
    if backbone.depth == 10:
        obstacles.append("no ResNet-10")
    return obstacles


def _input_notes(prepared: Preprocessing, to: Library) -> list[str]:
    habit = {
        "torchvision": "leave out transforms.Normalize",
        "timm": "timm's own convention subtracts them, `convention` below replaces it",
    }
    size = prepared.image_size
    return [
        f"input: float32 [N,3,{size},{size}] in [0,1], RGB, no mean or deviation subtracted: "
        f"{habit[to]}",
        f"before it: {prepared.in_words()}, without the antialiasing of {to}'s transforms",
    ]


def _omissions(portable: PortableModel, to: Library) -> list[str]:
    architecture = portable.architecture
    omissions = []
    if portable.model.head is not None:
        omissions.append("left out: the projection head")
    if architecture.classes is not None and _fc_classes(architecture) is None:
        omissions.append(
            f"left out: the classifier, which reads head layer {architecture.from_layer} where "
            f"{to}'s reads the features; --to safetensors and --to onnx keep it"
        )
    return omissions


def _differences(portable: PortableModel, to: Library) -> list[str]:
    """Say where the official network is not the library's, and what that amounts to."""
    backbone, size = portable.architecture.backbone, portable.preprocessing.image_size
    differences = []
    if not DEPTHS[backbone.depth].bottleneck:
        differences.append(
            f"shortcut: the official ResNet-{backbone.depth} has a convolution in that of layer1.0,"
            f" {to}'s has none; the line below that sets `downsample` adds it"
        )
    maps = _stem_maps(size)
    differences += [
        f"stem max-pool: the official network pads even maps by 0 before and 1 after, {to}'s by 1 "
        "and 1; both pad odd maps by 1 and 1",
        f"measured on {_SAMPLES} sample images of {size} pixels: {to}'s pool {_measured(portable)}",
    ]
    if maps % 2 == 0:
        differences.append(
            "outputs are equal once the line below that sets `maxpool` has replaced it; it is right"
            f" for even maps, as {maps} at {size} pixels"
        )
    else:
        differences.append(
            f"no replacement is needed for odd maps, as {maps} at {size} pixels; for even ones it "
            f"is {_POOL}"
        )
    return differences


def _stem_maps(image_size: int) -> int:
    """Return the side of what the stem's max-pool reads: half the image, rounded up."""
    return (image_size + 1) // 2


def _measured(portable: PortableModel) -> str:
    """Say what the library's pool changes in the network's outputs."""
    twin = restore_model(portable.architecture, portable.model.state_dict())  # the same memory
    twin.backbone.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
    images = _sample(portable.preprocessing.image_size)
    ours, theirs = _outputs(portable.model, images), _outputs(twin, images)
    largest = float(ours.features.abs().max())
    moved = float((theirs.features - ours.features).abs().max())
    if not math.isfinite(largest + moved):
        raise CheckpointError("the network's features are not finite: its weights are damaged")
    share = moved / largest if largest else 0.0
    text = f"changes features by up to {share:.1e} of the largest value"
    if _fc_classes(portable.architecture) is None or ours.logits is None or theirs.logits is None:
        return text
    others = int((ours.logits.argmax(dim=1) != theirs.logits.argmax(dim=1)).sum())
    return f"{text}, and the top-1 class of {others} of them"


def _sample(
    size: int,
) -> Tensor:  # float32 [2, 3, S, S] in [0, 1]
    """Draw images of blurred colours, the same ones each time."""
    counters = np.zeros((_SAMPLES * 3 * _CELLS**2, 4), np.uint32)
    counters[:, 0] = np.arange(len(counters))
    colours = uniform(philox(0, 0, counters)[:, 0]).reshape(_SAMPLES, 3, _CELLS, _CELLS)
    return F.interpolate(torch.from_numpy(colours), (size, size), mode="bilinear")


@torch.no_grad()
def _outputs(
    model: SimCLR,
    images: Tensor,  # [N, 3, S, S]
) -> Outputs:
    outputs: Outputs = model(images)
    return outputs


def _loading(portable: PortableModel, path: Path, to: Library) -> list[str]:
    """Write the Python lines that make the library's model compute what ours does."""
    depth = portable.architecture.backbone.depth
    plan, classes = DEPTHS[depth], _fc_classes(portable.architecture)
    prepared = portable.preprocessing
    lines = [f"import safetensors.torch, torch, {to}"]
    if to == "timm":
        lines += [
            f"convention = dict(input_size=(3, {prepared.image_size}, {prepared.image_size}), "
            f'crop_pct={prepared.eval_crop_proportion:g}, interpolation="bicubic", '
            "mean=(0, 0, 0), std=(1, 1, 1))",
            f'model = timm.create_model("resnet{depth}", num_classes={classes or 0}, '
            "pretrained_cfg_overlay=convention)",
        ]
    else:
        outputs = "" if classes is None else f"num_classes={classes}"
        if depth == 200:  # torchvision's class builds it, but no function is named after it
            block = "torchvision.models.resnet.Bottleneck"
            arguments = f"{block}, {list(plan.blocks)}{', ' if outputs else ''}{outputs}"
            lines.append(f"model = torchvision.models.resnet.ResNet({arguments})")
        else:
            lines.append(f"model = torchvision.models.resnet{depth}({outputs})")
        if classes is None:
            lines.append("model.fc = torch.nn.Identity()")
    if not plan.bottleneck:
        lines.append(
            "model.layer1[0].downsample = torch.nn.Sequential("
            "torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64))"
        )
    lines.append(f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))")
    if _stem_maps(prepared.image_size) % 2 == 0:
        lines.append(_POOL)
    return [*lines, "model.eval()"]


def _fc_classes(architecture: Architecture) -> int | None:
    """Return the outputs of `fc`; None where no classifier reads the features."""
    return architecture.classes if architecture.from_layer == 0 else None


def _renamed(portable: PortableModel) -> dict[str, Tensor]:
    model = portable.model
    tensors: dict[str, Tensor] = dict(model.backbone.state_dict())
    for name, module in model.backbone.named_modules():
        if isinstance(module, BatchNorm):  # PyTorch's own counts its batches, and loads the count
            tensors[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    if model.classifier is not None and model.from_layer == 0:
        tensors["fc.weight"] = model.classifier.weight
        tensors["fc.bias"] = model.classifier.bias
    return tensors


def _metadata(portable: PortableModel) -> dict[str, str]:
    prepared = portable.preprocessing
    classes = () if _fc_classes(portable.architecture) is None else portable.classes
    convention = {
        "range": [0, 1],
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "image_size": prepared.image_size,
        "crop_proportion": prepared.eval_crop_proportion,
        "interpolation": "bicubic",
        "resize": prepared.resize,
    }
    return {
        "format": "pt",  # what other readers of safetensors expect of PyTorch's weights
        "input": json.dumps(convention),
        "classes": json.dumps(classes),
        "origin": portable.origin,
    }
