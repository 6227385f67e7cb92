"""Official names of a network's variables, and official arrays as our tensors.

The TF1 code numbers convolutions and batch norms in the order of creation, in which our modules
are registered. The TF2 code stores objects: a variable is found by the attributes that lead to it.
"""

from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigsimclr.models.norm import BatchNorm
from bigsimclr.models.resnet import BasicBlock, Bottleneck, ResNet, ShortcutPool
from bigsimclr.models.selective import SelectiveKernel
from bigsimclr.models.simclr import SimCLR

Naming = Literal["tf1", "tf2"]

_NORM_VARIABLES: Final = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_LINEAR_VARIABLES: Final = {"weight": "kernel", "bias": "bias"}  # convolutions too


def names_in(naming: Naming, model: SimCLR) -> dict[str, str]:
    """Name every parameter and running statistic as TF1 or TF2 does: our name -> its name."""
    return official_names(model) if naming == "tf1" else object_paths(model)


def official_names(model: SimCLR) -> dict[str, str]:
    """Name every parameter and running statistic as the TF1 code does: our name -> its name.

    Source: google-research/simclr model.py, resnet.py, model_util.py (variable scopes, and
        `tf.layers`, whose names count from the first, without a number, upwards).
    """
    layers: dict[str, str] = {}
    convolutions = norms = 0
    for ours, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, nn.Conv2d):
            layers[ours] = "base_model/conv2d" + (f"_{convolutions}" if convolutions else "")
            convolutions += 1
        elif isinstance(module, BatchNorm):
            layers[ours] = "base_model/batch_normalization" + (f"_{norms}" if norms else "")
            norms += 1
    for index in range(0 if model.head is None else len(model.head.layers)):
        layers[f"head.layers.{index}.dense"] = f"head_contrastive/nl_{index}/dense"
        layers[f"head.layers.{index}.bn"] = f"head_contrastive/nl_{index}/batch_normalization"
    if model.classifier is not None:
        layers["classifier"] = "head_supervised/linear_layer/dense"
    return _variables(model, layers)


def object_paths(model: SimCLR) -> dict[str, str]:
    """Say of every parameter and running statistic where TF2 keeps it: our name -> its path.

    A path, such as `model/resnet_model/block_groups/0/layers/1/conv2d_bn_layers/0/conv2d/kernel`,
    holds attributes and list positions. Unlike the names that Keras gives variables, it depends
    neither on the order of building nor on what else the process had built.

    Source: google-research/simclr tf2/model.py, tf2/resnet.py (attributes of the layers; lists
        also count what has no variables, as padding, pooling and DropBlock).
    """
    backbone = model.backbone
    if not isinstance(backbone, ResNet):
        raise AssertionError("official checkpoints hold ResNets")
    layers = {
        f"backbone.{ours}": f"model/resnet_model/initial_conv_relu_max_pool/{theirs}"
        for ours, theirs in _stem_paths(backbone).items()
    }
    for number, group in enumerate((1, 2, 3, 4)):
        for index, block in enumerate(backbone.get_submodule(f"layer{group}").children()):
            if not isinstance(block, BasicBlock | Bottleneck):
                raise AssertionError("a ResNet is made of these blocks")
            place = f"model/resnet_model/block_groups/{number}/layers/{index}"
            for ours, theirs in _block_paths(block).items():
                layers[f"backbone.layer{group}.{index}.{ours}"] = f"{place}/{theirs}"
    for index in range(0 if model.head is None else len(model.head.layers)):
        place = f"model/_projection_head/linear_layers/{index}"
        layers[f"head.layers.{index}.dense"] = f"{place}/dense"
        layers[f"head.layers.{index}.bn"] = f"{place}/bn_relu/bn"
    if model.classifier is not None:
        layers["classifier"] = "model/supervised_head/linear_layer/dense"
    return _variables(model, layers)


def from_official(array: NDArray[np.generic]) -> Tensor:
    """Copy an official array into a tensor: HWIO to OIHW, [in, out] to [out, in], else as it is."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    moved = array if axes is None else array.transpose(axes)
    return torch.from_numpy(np.array(moved, order="C"))


def official_shape(
    tensor: Tensor,  # [O, I, H, W] or [out, in] or [C]
) -> tuple[int, ...]:
    """Return the shape of the official array that `from_official` makes such a tensor of."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim)
    return tuple(tensor.shape if axes is None else (tensor.shape[axis] for axis in axes))


def _variables(model: SimCLR, layers: dict[str, str]) -> dict[str, str]:
    """Expand layers, our name -> official one, into their variables."""
    names: dict[str, str] = {}
    for ours, theirs in layers.items():
        module = model.get_submodule(ours)
        variables = _NORM_VARIABLES if isinstance(module, BatchNorm) else _LINEAR_VARIABLES
        for own, official in variables.items():
            if getattr(module, own) is not None:
                names[f"{ours}.{own}"] = f"{theirs}/{official}"
    if names.keys() != model.state_dict().keys():
        raise AssertionError("a variable has no official name")
    return names


def _stem_paths(backbone: ResNet) -> dict[str, str]:
    if isinstance(backbone.conv1, nn.Sequential):
        convolutions = {"conv1.0": "0/conv2d", "conv1.3": "2/conv2d", "conv1.6": "4/conv2d"}
        return convolutions | {"conv1.1": "1/bn", "conv1.4": "3/bn", "bn1": "6/bn"}
    return {"conv1": "0/conv2d", "bn1": "2/bn"}


def _block_paths(block: BasicBlock | Bottleneck) -> dict[str, str]:
    paths: dict[str, str] = {}
    if block.downsample is not None:
        places = "shortcut_layers" if isinstance(block, BasicBlock) else "projection_layers"
        pool, at, official_at = block.downsample[0], 0, 0
        if isinstance(pool, ShortcutPool):
            at, official_at = 1, 1 if pool.stride == 1 else 2  # a stride has a padding before it
        paths[f"downsample.{at}"] = f"{places}/{official_at}/conv2d"
        paths[f"downsample.{at + 1}"] = f"{places}/{official_at + 1}/bn"
    if isinstance(block, BasicBlock):
        places = "conv2d_bn_layers"
        return paths | {
            "conv1": f"{places}/0/conv2d",
            "bn1": f"{places}/1/bn",
            "conv2": f"{places}/2/conv2d",
            "bn2": f"{places}/3/bn",
        }
    places = "conv_relu_dropblock_layers"
    paths |= {"conv1": f"{places}/0/conv2d", "bn1": f"{places}/1/bn"}
    if isinstance(block.conv2, SelectiveKernel):
        return paths | {
            "conv2.conv": f"{places}/3/conv2d_fixed_padding/conv2d",
            "conv2.bn": f"{places}/3/batch_norm_relu/bn",
            "conv2.reduce": f"{places}/3/conv2d_0",
            "conv2.reduce_bn": f"{places}/3/batch_norm_relu_1/bn",
            "conv2.expand": f"{places}/3/conv2d_1",
            "conv3": f"{places}/5/conv2d",
            "bn3": f"{places}/6/bn",
        }
    return paths | {
        "conv2": f"{places}/3/conv2d",
        "bn2": f"{places}/4/bn",
        "conv3": f"{places}/6/conv2d",
        "bn3": f"{places}/7/bn",
    }
