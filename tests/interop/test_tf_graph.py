"""The layer that a classifier reads, as graphs of TF1 and TF2 tell it, or do not tell it."""

from pathlib import Path

import pytest

from bigsimclr.interop.tf_checkpoint import import_checkpoint
from bigsimclr.interop.tf_graph import layer_in_graph
from tests.interop.official import architecture, network, tf1_variables
from tests.interop.write_bundle import integer, message, write_bundle

Nodes = dict[str, tuple[str, list[str]]]  # name -> operation and inputs


def tf1_nodes(from_layer: int, layers: int = 3, scope: str = "") -> Nodes:
    """Return the nodes that matter, as TF1 names them."""
    nodes: Nodes = {
        "images": ("Placeholder", []),
        "base_model/conv2d/Conv2D": ("Conv2D", ["images", "base_model/conv2d/kernel/read"]),
        "base_model/final_avg_pool": ("Identity", ["base_model/conv2d/Conv2D:0", "^images"]),
    }
    outputs = ["base_model/final_avg_pool"]
    for layer in range(layers):
        place = f"head_contrastive/nl_{layer}"
        nodes[f"{place}/dense/MatMul"] = ("MatMul", [outputs[-1], f"{place}/dense/kernel/read"])
        outputs.append(f"head_contrastive/Relu_{layer}")
        nodes[outputs[-1]] = ("Relu", [f"{place}/dense/MatMul"])
    # Order is no data, nor is the kernel what is read.
    place = "head_supervised/linear_layer/dense"
    nodes["StopGradient"] = ("StopGradient", [outputs[from_layer]])
    inputs = ["StopGradient", f"{place}/kernel/read", f"^{outputs[-1]}"]
    nodes[f"{place}/MatMul"] = ("MatMul", inputs)
    nodes[f"{place}/kernel/read"] = ("Identity", [outputs[-1]])
    return {
        scope + name: (operation, [_scoped(scope, text) for text in inputs])
        for name, (operation, inputs) in nodes.items()
    }


def _scoped(scope: str, text: str) -> str:
    return f"^{scope}{text[1:]}" if text.startswith("^") else scope + text


def encoded(nodes: Nodes, field: int = 1) -> bytes:
    """Write nodes, the consumers first: order in a graph means nothing."""
    rows = []
    for name, (operation, inputs) in reversed(nodes.items()):
        content = message(1, name.encode()) + message(2, operation.encode())
        content += b"".join(message(3, text.encode()) for text in inputs)
        rows.append(message(field, content + message(5, b"an attribute")))
    return b"".join(rows)


def meta_graph(graph: bytes) -> bytes:
    return message(1, b"") + message(2, graph + message(4, integer(1, 24)))


def layer_of(folder: Path, graph: bytes) -> int | None:
    (folder / "model.ckpt-7.meta").write_bytes(meta_graph(graph))
    return layer_in_graph(folder / "model.ckpt-7")


@pytest.mark.parametrize("scope", ["", "module/", "while/body/"])
@pytest.mark.parametrize("layer", range(4))
def test_graphs_of_training(tmp_path: Path, layer: int, scope: str) -> None:
    assert layer_of(tmp_path, encoded(tf1_nodes(layer, scope=scope))) == layer


@pytest.mark.parametrize("layer", range(4))
def test_functions_of_saved_models(tmp_path: Path, layer: int) -> None:
    """Their nodes say which output of a node they take, and Keras numbers its layers."""
    nodes: Nodes = {
        name.replace("head_contrastive", "projection_head").replace("/dense/", "/dense_3/"): (
            operation,
            [text.replace("/dense/", "/dense_3/") for text in inputs],
        )
        for name, (operation, inputs) in tf1_nodes(layer).items()
    }
    nodes = {
        name: (operation, [text.replace("head_contrastive", "projection_head") for text in inputs])
        for name, (operation, inputs) in nodes.items()
    }
    nodes["StopGradient"] = ("StopGradient", [f"{nodes['StopGradient'][1][0]}:output:0"])
    (tmp_path / "variables").mkdir()
    library = message(2, message(1, message(1, b"a signature") + encoded(nodes, field=3)))
    content = integer(1, 1) + message(2, meta_graph(library))
    (tmp_path / "saved_model.pb").write_bytes(content)
    assert layer_in_graph(tmp_path / "variables" / "variables") == layer
    assert layer_in_graph(tmp_path / "elsewhere" / "variables") is None


def test_what_does_not_tell(tmp_path: Path) -> None:
    assert layer_in_graph(tmp_path / "model.ckpt-7") is None
    nodes = tf1_nodes(1)
    assert layer_of(tmp_path, encoded(nodes)) == 1
    assert layer_of(tmp_path, b"") is None
    without = {name: node for name, node in nodes.items() if "supervised" not in name}
    assert layer_of(tmp_path, encoded(without)) is None
    cut = nodes | {"StopGradient": ("Placeholder", [])}
    assert layer_of(tmp_path, encoded(cut)) is None
    hidden = nodes | {"head_contrastive/Relu_0": ("StatefulPartitionedCall", ["images"])}
    assert layer_of(tmp_path, encoded(hidden)) is None
    two = encoded(tf1_nodes(1)) + encoded(tf1_nodes(2, scope="eval/"))
    assert layer_of(tmp_path, two) is None
    assert layer_of(tmp_path, encoded(tf1_nodes(1)) + encoded(tf1_nodes(1, scope="eval/"))) == 1


def test_cycles_end(tmp_path: Path) -> None:
    nodes = tf1_nodes(2)
    nodes["images"] = ("Merge", ["base_model/final_avg_pool"])
    assert layer_of(tmp_path, encoded(nodes)) == 2


def test_damage_is_no_answer(tmp_path: Path) -> None:
    content = meta_graph(encoded(tf1_nodes(1)))
    for at in range(0, len(content), 3):
        for changed in (content[:at], content[:at] + b"\xff" + content[at + 1 :]):
            (tmp_path / "model.ckpt-7.meta").write_bytes(changed)
            assert layer_in_graph(tmp_path / "model.ckpt-7") in (None, 0, 1)


@pytest.mark.parametrize("layer", range(4))
def test_an_import_follows_the_graph(tmp_path: Path, layer: int) -> None:
    """A released pretrained network classifies features: with three layers that is not usual."""
    model = network(architecture(outputs=16, from_layer=layer))
    prefix = tmp_path / "model.ckpt-7"
    write_bundle(prefix, tf1_variables(model))
    imported = import_checkpoint(prefix)
    assert not imported.layer_is_recorded
    assert imported.portable.architecture.from_layer == 1
    assert layer_of(tmp_path, encoded(tf1_nodes(layer))) == layer
    imported = import_checkpoint(prefix)
    assert imported.layer_is_recorded
    assert imported.portable.architecture.from_layer == layer
    other = import_checkpoint(prefix, from_layer=(layer + 1) % 4)
    assert other.portable.architecture.from_layer == (layer + 1) % 4
    assert not other.layer_is_recorded


def test_a_graph_of_another_network_is_not_believed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model.ckpt-7", tf1_variables(network(architecture(layers=2))))
    for layer in (2, 5):  # of another width, and beyond the head
        assert layer_of(tmp_path, encoded(tf1_nodes(layer, layers=6))) == layer
        imported = import_checkpoint(tmp_path / "model.ckpt-7")
        assert imported.portable.architecture.from_layer == 0
        assert not imported.layer_is_recorded
