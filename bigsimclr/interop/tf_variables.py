"""The variables of an official checkpoint, by their places in a network."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_bundle import Bundle, open_bundle
from bigsimclr.interop.tf_names import Naming, names_in, official_shape
from bigsimclr.interop.tf_objects import GRAPH_KEY, ObjectGraph
from bigsimclr.models import Architecture, build_model

# No weights of the network: counters, what optimizers keep, metrics, averaged copies, a queue.
_OTHER_NAMES: Final = {"global_step", "beta1_power", "beta2_power", GRAPH_KEY}
_OTHER_STARTS: Final = (
    "global_step/",
    "save_counter/",
    "optimizer/",
    "keras_api/metrics/",
    "ema_model/",
    "memory",
)
_OTHER_ENDS: Final = ("/Momentum", "/Adam", "/Adam_1", "/ExponentialMovingAverage")
_SLOT: Final = "/.OPTIMIZER_SLOT/"
_VALUE: Final = "/.ATTRIBUTES/VARIABLE_VALUE"

_NAMED: Final = 3  # problems that an error names


@dataclass(frozen=True)
class OfficialVariables:
    """An open checkpoint whose variables are found by official name.

    That is the TF1 name, as `base_model/conv2d/kernel`, or the path of the TF2 object, as
    `model/resnet_model/initial_conv_relu_max_pool/0/conv2d/kernel`.
    """

    bundle: Bundle
    naming: Naming
    keys: frozenset[str]  # of the bundle, without those that are no weights
    graph: ObjectGraph | None  # of a TF2 checkpoint

    def key(self, name: str) -> str | None:
        """Return the key of a variable in the bundle; None where there is no such variable."""
        key = name if self.graph is None else self.graph.key(name)
        return key if key in self.keys else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a variable; None where there is no such variable."""
        key = self.key(name)
        return None if key is None else self.bundle.variables[key].shape

    def has_momentum(self, name: str) -> bool:
        """Say whether a TF2 optimizer had moved a variable: it keeps something for those it did."""
        key = self.key(name)  # not the name: it may be called after its place in a list
        if key is None:
            return False
        start = f"{key.removesuffix(_VALUE)}{_SLOT}"
        return any(other.startswith(start) for other in self.bundle.variables)


def open_variables(prefix: Path) -> OfficialVariables:
    """Open a checkpoint, and tell its weights from all else that it holds.

    Raises:
        CheckpointError: it is damaged, or no checkpoint of the official code.
    """
    bundle = open_bundle(prefix)
    graph = None
    if GRAPH_KEY in bundle.variables:
        graph = ObjectGraph(prefix, bundle.read_text(GRAPH_KEY))
    keys = frozenset(key for key in bundle.variables if not _is_other(key))
    return OfficialVariables(bundle, "tf1" if graph is None else "tf2", keys, graph)


def match_variables(variables: OfficialVariables, architecture: Architecture) -> Mapping[str, str]:
    """Return the key of each entry of a network's state, if all match and none is left over.

    Raises:
        CheckpointError: variables are missing, misshapen, of another type, or unknown.
    """
    with torch.device("meta"):
        model = build_model(architecture, seed=0)
    state, keys, problems = model.state_dict(), dict[str, str](), list[str]()
    for ours, name in names_in(variables.naming, model).items():
        key = variables.key(name)
        if key is None:
            problems.append(f"{name!r} is missing")
            continue
        keys[ours] = key
        found, expected = variables.bundle.variables[key], official_shape(state[ours])
        if found.shape != expected:
            problems.append(f"{name!r} has shape {list(found.shape)}, not {list(expected)}")
        elif found.dtype != "float32":
            problems.append(f"{name!r} is {found.dtype}, not float32")
    unknown = sorted(variables.keys - set(keys.values()))
    problems.extend(f"{key.removesuffix(_VALUE)!r} is not part of it" for key in unknown)
    if problems:
        backbone = architecture.backbone
        raise CheckpointError(
            f"{variables.bundle.prefix} does not fit the network it resembles most (ResNet-"
            f"{backbone.depth} {backbone.width:g}x, {_kernels(architecture)}, {backbone.stem} "
            f"stem): {'; '.join(_first(problems))}"
        )
    return keys


def _is_other(key: str) -> bool:
    return (
        key in _OTHER_NAMES
        or key.startswith(_OTHER_STARTS)
        or key.endswith(_OTHER_ENDS)
        or _SLOT in key
    )


def _kernels(architecture: Architecture) -> str:
    return f"{'with' if architecture.backbone.selective_kernel else 'no'} selective kernels"


def _first(problems: list[str]) -> Iterator[str]:
    yield from problems[:_NAMED]
    if len(problems) > _NAMED:
        yield f"and {len(problems) - _NAMED} more"
