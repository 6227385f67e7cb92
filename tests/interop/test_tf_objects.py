"""Object graphs of TF2 checkpoints: the key at a path, or None, or one error; in bounded time."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_objects import ObjectGraph
from tests.interop.official import Objects, node
from tests.interop.write_bundle import integer, message, varint

CHECKPOINT = Path("ckpt-9")
STEM = "model/resnet_model/stem"
VALUE = ".ATTRIBUTES/VARIABLE_VALUE"


def graph(text: bytes) -> ObjectGraph:
    return ObjectGraph(CHECKPOINT, text)


def small() -> Objects:
    """A model with two variables, one of which two paths lead to."""
    objects = Objects()
    for name in ("kernel", "bias"):
        objects.keys[objects.at(f"{STEM}/{name}")] = f"{STEM}/{name}/{VALUE}"
    objects.children[objects.at("model")]["again"] = objects.at(STEM)
    return objects


# --- paths --------------------------------------------------------------------------------------


def test_paths_lead_to_keys() -> None:
    found = graph(small().encode())
    assert found.key(f"{STEM}/kernel") == f"{STEM}/kernel/{VALUE}"
    assert found.key(f"{STEM}/bias") == f"{STEM}/bias/{VALUE}"
    assert found.key("model/again/bias") == f"{STEM}/bias/{VALUE}"


@pytest.mark.parametrize(
    "path",
    [
        STEM,  # no variable
        "model",
        f"{STEM}/gamma",
        f"{STEM}/kernel/more",
        "model/resnet_model/stem2/kernel",
        f"{STEM}//kernel",
        f"{STEM}/kernel/",
        f"/{STEM}/kernel",
        "other/resnet_model/stem/kernel",
        "resnet_model/stem/kernel",
        "",
        "/",
    ],
)
def test_paths_that_lead_nowhere(path: str) -> None:
    found = graph(small().encode())
    assert found.key(path) is None
    assert found.key(f"{STEM}/kernel") is not None


def test_the_model_may_be_the_root() -> None:
    objects = Objects()
    objects.keys[objects.at("resnet_model/stem/kernel")] = "a/key"
    assert graph(objects.encode()).key(f"{STEM}/kernel") == "a/key"


def test_only_values_of_variables_count() -> None:
    """Objects have other attributes, and values may come without a key."""
    attribute = message(1, b"OBJECT_CONFIG_JSON") + message(3, b"wrong")
    value = message(1, b"VARIABLE_VALUE") + message(3, b"right")
    rows = [
        node({"resnet_model": 1}),
        node({"a": 2, "b": 3, "c": 4}),
        message(1, message(2, attribute) + message(2, value)),
        message(1, message(2, attribute)),
        message(1, message(2, message(1, b"VARIABLE_VALUE"))),
    ]
    found = graph(b"".join(rows))
    keys = [found.key(f"model/resnet_model/{name}") for name in "abc"]
    assert keys == ["right", None, ""]


def test_unknown_fields_are_passed_over() -> None:
    more = integer(9, 5) + message(10, b"text") + varint(11 << 3 | 5) + b"four"
    value = message(1, b"VARIABLE_VALUE") + more + message(3, b"right") + integer(4, 1)
    reference = integer(1, 2) + message(2, b"a") + more
    rows = [
        message(8, b"no object"),
        node({"resnet_model": 1}),
        message(1, more + message(1, reference)),
        more,
        message(1, message(2, value) + more + message(3, b"a slot")),
    ]
    assert graph(b"".join(rows)).key("model/resnet_model/a") == "right"


def test_cycles_end() -> None:
    objects = small()
    stem, model = objects.at(STEM), objects.at("model")
    objects.children[stem]["up"] = model
    objects.children[stem]["self"] = stem
    found = graph(objects.encode())
    assert found.key(f"{STEM}/self/self/self/kernel") == f"{STEM}/kernel/{VALUE}"
    assert found.key(f"{STEM}/up/again/up/resnet_model/stem/bias") == f"{STEM}/bias/{VALUE}"
    assert found.key(f"{STEM}/self/gamma") is None


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"", integer(1, 7), message(2, b"")])
def test_a_graph_without_objects(text: bytes) -> None:
    with pytest.raises(CheckpointError, match="its object graph is empty"):
        graph(text)


def test_a_graph_of_something_else() -> None:
    for path in ("model/encoder/kernel", "encoder/resnet_model/kernel"):
        objects = Objects()
        objects.at(path)
        with pytest.raises(CheckpointError, match="but not of SimCLR: its objects have no `model/"):
            graph(objects.encode())


@pytest.mark.parametrize("child", [5, 1 << 31, 1 << 62, (1 << 64) - 1, -1, -(1 << 31), -(1 << 63)])
def test_children_that_do_not_exist(child: int) -> None:
    rows = [node({"model": 1}), node({"resnet_model": 2}), node({"a": 3}), node({"b": child})]
    with pytest.raises(CheckpointError, match="its object graph has no object"):
        graph(b"".join(rows)).key("model/resnet_model/a/b")
    with pytest.raises(CheckpointError, match="its object graph has no object"):
        graph(node({"model": child}))
    # Objects that no path asks about are not looked into.
    assert graph(b"".join(rows)).key("model/resnet_model/b") is None


def test_a_child_number_of_another_kind() -> None:
    with pytest.raises(CheckpointError, match="its object graph has no object b'one'"):
        graph(message(1, message(1, message(1, b"one") + message(2, b"model"))))


def damaged(text: bytes) -> Iterator[bytes]:
    for size in range(len(text)):
        yield text[:size]
    for at in range(len(text)):
        for bit in range(8):
            yield text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]


def test_all_small_damage_gives_an_answer_or_an_error() -> None:
    paths = (f"{STEM}/kernel", f"{STEM}/bias", "model/again/kernel", "model/resnet_model/none")
    errors, answers = 0, 0
    for text in damaged(small().encode()):
        try:
            found = graph(text)
            keys = [found.key(path) for path in paths]
        except CheckpointError:
            errors += 1
        else:
            answers += 1
            assert all(key is None or isinstance(key, str) for key in keys)
    assert errors > 500
    assert answers > 500


def test_large_graphs_take_little_time() -> None:
    """Neither many children of the same name nor long chains are read more than once."""
    wide = message(1, message(1, integer(1, 0) + message(2, b"resnet_model")) * 100_000)
    started = time.process_time()
    found = graph(wide)
    for number in range(1000):
        assert found.key(f"model/resnet_model/{number}") is None
    assert found.key("model" + "/resnet_model" * 400) is None
    assert time.process_time() - started < 10
