"""What the graph stored beside a checkpoint tells of the network: the layer its classifier reads.

Released checkpoints come with a `.meta` file or as a SavedModel (a TF-Hub module is one). Neither
carries checksums, so nothing but this one fact, which the variables leave open, is taken from them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_table import ByteReader

_LIMIT: Final = 256 << 20  # bytes
_CLASSIFIER: Final = re.compile(r"(?:^|/)head_supervised/linear_layer/dense(?:_\d+)?/MatMul$")
_HEAD_LAYER: Final = re.compile(r"(?:^|/)nl_(\d+)/dense(?:_\d+)?/MatMul$")
_HIDES_OTHERS: Final = re.compile(r"(?:Call|While|If|Case)$")  # operations made of a function


@dataclass(frozen=True)
class _Node:
    operation: str
    inputs: tuple[str, ...]  # names of the nodes it takes data from


def layer_in_graph(prefix: Path) -> int | None:
    """Return what the classifier reads, 0 the features, k the output of the head's layer k.

    Args:
        prefix: of the checkpoint's files.

    Returns:
        None where there is no graph, or it is damaged, has no classifier, or does not tell.

    Source: google-research/simclr model_util.py supervised_head, tf2/model.py SupervisedHead, whose
        operations are named so; tensorflow/core/protobuf/{saved_model,meta_graph}.proto,
        tensorflow/core/framework/{graph,function,node_def}.proto.
    """
    try:
        found = {_layer(nodes, name) for nodes in _graphs(prefix) for name in _classifiers(nodes)}
    except (CheckpointError, OSError):
        return None
    return found.pop() if len(found) == 1 else None


def _classifiers(nodes: Mapping[str, _Node]) -> Iterator[str]:
    return (name for name in nodes if _CLASSIFIER.search(name))


def _layer(nodes: Mapping[str, _Node], classifier: str) -> int | None:
    """Return the highest layer of the head among all that the classifier's input is made of."""
    reached, waiting = set[str](), list(nodes[classifier].inputs[:1])
    while waiting:
        name = waiting.pop()
        if name in nodes and name not in reached:
            reached.add(name)
            waiting.extend(nodes[name].inputs)
    operations = {nodes[name].operation for name in reached}
    # Without a convolution this is a part of the network; the head may be in another.
    if "Conv2D" not in operations or any(map(_HIDES_OTHERS.search, operations)):
        return None
    layers = (_HEAD_LAYER.search(name) for name in reached)
    return max((int(layer[1]) + 1 for layer in layers if layer), default=0)


def _graphs(prefix: Path) -> Iterator[Mapping[str, _Node]]:
    """Yield the graphs of a checkpoint and those of their functions."""
    meta, saved_model = Path(f"{prefix}.meta"), prefix.parent.parent / "saved_model.pb"
    if meta.is_file():
        yield from _graphs_of_meta(meta, _content(meta))
    if prefix.parent.name == "variables" and saved_model.is_file():
        for content in _messages(saved_model, _content(saved_model), 2):
            yield from _graphs_of_meta(saved_model, content)


def _graphs_of_meta(path: Path, meta_graph: bytes) -> Iterator[Mapping[str, _Node]]:
    for graph in _messages(path, meta_graph, 2):
        yield _nodes(path, graph, 1)
        for library in _messages(path, graph, 2):
            for function in _messages(path, library, 1):
                yield _nodes(path, function, 3)


def _nodes(path: Path, graph: bytes, field: int) -> Mapping[str, _Node]:
    return dict(_node(path, content) for content in _messages(path, graph, field))


def _node(path: Path, content: bytes) -> tuple[str, _Node]:
    """Parse a NodeDef; an input is `node`, `node:1`, `node:output:1`, or `^node` for order only."""
    texts: dict[int, list[str]] = {1: [], 2: [], 3: []}
    reader = ByteReader(path, content)
    while reader.has_more:
        number, value = reader.field()
        if number in texts and isinstance(value, bytes):
            texts[number].append(value.decode("utf-8", "replace"))
    inputs = (text.partition(":")[0] for text in texts[3] if not text.startswith("^"))
    return "".join(texts[1][-1:]), _Node("".join(texts[2][-1:]), tuple(inputs))


def _messages(path: Path, message: bytes, field: int) -> Iterator[bytes]:
    reader = ByteReader(path, message)
    while reader.has_more:
        number, value = reader.field()
        if number == field and isinstance(value, bytes):
            yield value


def _content(path: Path) -> bytes:
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path} has more than {_LIMIT} bytes")
    return path.read_bytes()
