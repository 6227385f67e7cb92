"""Synthetic checkpoints with the names of the official code, of networks of every kind."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.interop.tf_names import object_paths, official_names
from bigsimclr.models import Architecture, build_model, restore_model
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.interop.write_bundle import integer, message

Variables = dict[str, NDArray[np.generic] | bytes]
Depth = Literal[10, 18, 34, 50, 101, 152, 200]

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = ".ATTRIBUTES/VARIABLE_VALUE"


def architecture(
    depth: Depth = 18,
    *,
    width: float = 1 / 32,
    selective_kernel: bool = False,
    stem: Literal["imagenet", "cifar"] = "cifar",
    layers: int = 3,
    outputs: int = 12,
    classes: int | None = 5,
    from_layer: int | None = None,
) -> Architecture:
    """Describe a small network; without `from_layer`, of the usual layer."""
    usual = 1 if classes is not None and layers >= 3 else 0
    return Architecture(
        ResNetBackbone(depth=depth, width=width, selective_kernel=selective_kernel, stem=stem),
        HeadSection(layers=layers, output_width=outputs) if layers else None,
        classes,
        usual if from_layer is None else from_layer,
    )


def network(description: Architecture, seed: int = 0) -> SimCLR:
    """Build a network of which no two values are equal by construction, not even biases."""
    with torch.device("meta"):
        shapes = build_model(description, seed=0).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(like.shape, generator=generator) for name, like in shapes.items()}
    return restore_model(description, weights)


def official(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor as the official code stores it; written apart from the package's own way."""
    array = tensor.numpy()
    match array.ndim:
        case 4:
            return np.einsum("oihw->hwio", array)
        case 2:
            return array.T
        case _:
            return array


def tf1_variables(model: SimCLR) -> Variables:
    """Return the weights of a network by TF1 name."""
    names = official_names(model)
    return {names[ours]: official(tensor) for ours, tensor in model.state_dict().items()}


def with_company(weights: Variables) -> Variables:
    """Add all that pretraining leaves beside the weights, with values that must not be taken."""
    others = {name: np.full_like(value, 7) for name, value in weights.items()}
    trained = {name: value for name, value in others.items() if "/moving_" not in name}
    company: Variables = {f"{name}/Momentum": value for name, value in trained.items()}
    company |= {f"ema_model/{name}": value for name, value in others.items()}
    company |= {f"{name}/ExponentialMovingAverage": value for name, value in trained.items()}
    company |= {
        "global_step": np.array(250228, "int64"),
        "memory": np.ones((16, 4), "float32"),
        "memory_ptr": np.array(3, "int64"),
    }
    return weights | company


def same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Say whether two states have the same names and, bit for bit, the same values."""
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype
        and tensor.shape == theirs[name].shape
        and tensor.contiguous().numpy().tobytes() == theirs[name].contiguous().numpy().tobytes()
        for name, tensor in ours.items()
    )


# --- TF2: objects -------------------------------------------------------------------------------


class Objects:
    """A tree of objects, and further ways to some of them; written as a TrackableObjectGraph."""

    def __init__(self) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.keys: dict[int, str] = {}  # of variables

    def at(self, path: str) -> int:
        """Return the number of the object at a path from the root; make it if it is not there."""
        number = 0
        for name in path.split("/"):
            if name not in self.children[number]:
                self.children.append({})
                self.children[number][name] = len(self.children) - 1
            number = self.children[number][name]
        return number

    def encode(self) -> bytes:
        """Write the graph."""
        return b"".join(
            node(children, self.keys.get(number)) for number, children in enumerate(self.children)
        )


def node(children: Mapping[str, int], key: str | None = None) -> bytes:
    """Write one object: its children, and the key of its value if it is a variable."""
    content = b"".join(
        message(1, integer(1, child) + message(2, name.encode()))
        for name, child in children.items()
    )
    if key is not None:
        attribute = message(1, b"VARIABLE_VALUE") + message(2, b"a/full/name")
        content += message(2, attribute + message(3, key.encode()))
    return message(1, content)


def tf2_variables(
    model: SimCLR,
    *,
    listed: bool = False,
    moved: frozenset[str] = frozenset(),
) -> Variables:
    """Return a TF2 checkpoint of a network, with its object graph.

    Args:
        model: the network.
        listed: as a SavedModel has it, with keys `trainable_variables_list/<number>`; else as the
            checkpoints of training have it, with keys that are paths, and counters.
        moved: our names of the variables for which the optimizer keeps a momentum.
    """
    objects, variables, state = Objects(), Variables(), model.state_dict()
    # In another order than ours, so that no number in a key can be taken for a place in our state.
    paths = sorted(object_paths(model).items(), key=lambda pair: pair[1][::-1])
    for number, (ours, path) in enumerate(paths):
        in_list = listed and ".running_" not in ours
        place = f"trainable_variables_list/{number}" if in_list else path
        found = objects.at(path)
        if in_list:
            objects.children[objects.at("trainable_variables_list")][str(number)] = found
        objects.keys[found] = f"{place}/{VALUE}"
        value = official(state[ours])
        variables[f"{place}/{VALUE}"] = value
        if ours in moved:
            slot = f"{place}/.OPTIMIZER_SLOT/optimizer/momentum/{VALUE}"
            variables[slot] = np.full_like(value, 7)
    if not listed:
        for name in ("global_step", "optimizer/iter", "save_counter"):
            objects.keys[objects.at(name)] = f"{name}/{VALUE}"
            variables[f"{name}/{VALUE}"] = np.array(9, "int64")
    return variables | {GRAPH: objects.encode()}
