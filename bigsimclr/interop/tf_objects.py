"""The object graph of a TF2 checkpoint: which key holds the variable that a path leads to.

Keys alone do not tell: a variable has the key of *one* of the paths to it, and a SavedModel calls
most of them `trainable_variables_list/<number>`. The graph lists every path.
"""

from collections.abc import Iterator
from pathlib import Path

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_table import ByteReader, damaged

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"


class ObjectGraph:
    """The objects of a checkpoint, from its model downwards.

    Args:
        path: the checkpoint, for errors.
        text: the graph as stored, a TrackableObjectGraph. Only what is asked for is parsed.

    Raises:
        CheckpointError: the text is damaged, or describes no model of the official code.

    Source: tensorflow/core/protobuf/trackable_object_graph.proto.
    """

    def __init__(self, path: Path, text: bytes) -> None:
        self._path = path
        nodes = (value for number, value in _fields(path, text) if number == 1)
        self._objects = [value for value in nodes if isinstance(value, bytes)]
        self._children: dict[int, dict[str, int]] = {}
        if not self._objects:
            raise damaged(path, "its object graph is empty")
        # A checkpoint holds the model beside optimizer and counters; it may also be the root.
        model = self._children_of(0).get("model", 0)
        if "resnet_model" not in self._children_of(model):
            raise CheckpointError(
                f"{path} is a TensorFlow 2 checkpoint, but not of SimCLR: its objects have no "
                "`model/resnet_model`"
            )
        self._found = {"model": model}

    def key(self, path: str) -> str | None:
        """Return the key of the variable at a path; None where there is none.

        Args:
            path: the model's attributes down to the variable, as `model/.../kernel`.

        Raises:
            CheckpointError: the graph is damaged.
        """
        found = self._object_at(path)
        if found is None:
            return None
        for field, attribute in self._messages(found):
            if field == 2 and _text(attribute.get(1)) == _VALUE:
                return _text(attribute.get(3))
        return None

    def _object_at(self, path: str) -> int | None:
        if path not in self._found:
            parent, _, name = path.rpartition("/")
            above = self._object_at(parent) if parent else None
            below = None if above is None else self._children_of(above).get(name)
            if below is None:
                return None
            self._found[path] = below
        return self._found[path]

    def _children_of(self, number: int) -> dict[str, int]:
        if number not in self._children:
            children = {}
            for field, reference in self._messages(number):
                if field == 1:
                    child = reference.get(1, 0)
                    if not isinstance(child, int) or not 0 <= child < len(self._objects):
                        raise damaged(self._path, f"its object graph has no object {child!r}")
                    children[_text(reference.get(2))] = child
            self._children[number] = children
        return self._children[number]

    def _messages(self, number: int) -> Iterator[tuple[int, dict[int, int | bytes]]]:
        """Yield the parts of an object: 1 for a child, 2 for an attribute, and its fields."""
        for field, value in _fields(self._path, self._objects[number]):
            if field in (1, 2) and isinstance(value, bytes):
                yield field, dict(_fields(self._path, value))


def _fields(path: Path, message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protocol buffer: number, and a number or the bytes of what it holds."""
    reader = ByteReader(path, message)
    while reader.has_more:
        yield reader.field()


def _text(value: int | bytes | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
