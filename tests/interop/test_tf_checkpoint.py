"""Checkpoints with official names become the networks they were written from, or one error."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bigsimclr.errors import CheckpointError, RecipeError
from bigsimclr.interop.tf_checkpoint import (
    compare_with_checkpoint,
    import_checkpoint,
)
from bigsimclr.models import Architecture
from tests.interop.official import (
    Variables,
    architecture,
    network,
    same_bits,
    tf1_variables,
    tf2_variables,
    with_company,
)
from tests.interop.write_bundle import write_bundle

NAME = "model.ckpt-250228"
KINDS = [
    architecture(10, classes=None),
    architecture(18),
    architecture(18, stem="imagenet", width=1 / 16, layers=0),
    architecture(34, stem="imagenet", layers=2, classes=None),
    architecture(50, layers=1, width=1 / 16),
    architecture(50, stem="imagenet", selective_kernel=True, layers=3),
    architecture(50, stem="cifar", selective_kernel=True, width=3 / 32, layers=4),
    architecture(101, selective_kernel=True, stem="imagenet", layers=0, classes=None),
    architecture(101, stem="imagenet", width=2 / 32, classes=1000),
    architecture(152),
    architecture(200, selective_kernel=True, stem="imagenet", layers=2),
]


def shorthand(description: Architecture) -> str:
    backbone, head = description.backbone, description.head
    return (
        f"r{backbone.depth}-{backbone.width * 32:g}/32-{backbone.stem}"
        f"{'-sk' * backbone.selective_kernel}-head{head.layers if head else 0}"
        f"-classes{description.classes or 0}"
    )


@pytest.fixture
def small() -> Variables:
    return tf1_variables(network(architecture(18)))


def complaint(folder: Path, variables: Variables) -> str:
    write_bundle(folder / NAME, variables)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(folder / NAME)
    return str(caught.value)


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("description", KINDS, ids=shorthand)
def test_a_network_comes_back(tmp_path: Path, description: Architecture) -> None:
    model = network(description)
    weights = tf1_variables(model)
    variables = with_company(weights)
    write_bundle(tmp_path / NAME, variables, shards=2)
    imported = import_checkpoint(tmp_path / NAME)
    assert imported.portable.architecture == description
    assert same_bits(imported.portable.model.state_dict(), model.state_dict())
    assert not imported.portable.model.training
    assert imported.naming == "tf1"
    assert imported.variables == len(weights)
    assert imported.skipped == len(variables) - len(weights)
    assert imported.portable.origin == "model.ckpt-250228 (TF1)"
    assert imported.portable.classes == tuple(map(str, range(description.classes or 0)))
    cifar = description.backbone.stem == "cifar"
    assert imported.portable.preprocessing.image_size == (32 if cifar else 224)
    assert imported.portable.preprocessing.resize == "tf1"
    assert compare_with_checkpoint(imported.prefix, imported.portable) == len(weights)
    with torch.no_grad():
        outputs = imported.portable.model(torch.rand(2, 3, 33, 33))
    assert len(outputs.projections) == (description.head.layers if description.head else 0)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [12, 16])
@pytest.mark.parametrize(
    ("layers", "from_layer"), [(layers, k) for layers in range(5) for k in range(layers + 1)]
)
def test_the_layer_that_the_classifier_reads(
    tmp_path: Path, layers: int, from_layer: int, outputs: int
) -> None:
    """It shows where its width is that of one layer only; else it is said, or the usual one."""
    features = 16
    description = architecture(layers=layers, outputs=outputs, from_layer=from_layer)
    model = network(description)
    write_bundle(tmp_path / NAME, tf1_variables(model))
    said = import_checkpoint(tmp_path / NAME, from_layer=from_layer).portable
    assert said.architecture == description
    assert same_bits(said.model.state_dict(), model.state_dict())
    usual = 1 if layers >= 3 else 0
    shows = outputs != features and from_layer == layers != 0
    guessed = import_checkpoint(tmp_path / NAME).portable.architecture
    assert guessed.from_layer == (from_layer if shows else usual)
    for other in range(layers + 1):
        fits = (other == layers != 0) == (from_layer == layers != 0) or outputs == features
        if fits:
            assert import_checkpoint(tmp_path / NAME, from_layer=other)
        else:
            with pytest.raises(RecipeError, match=rf"from_layer {other}: its width is"):
                import_checkpoint(tmp_path / NAME, from_layer=other)


def test_simclr_of_the_first_version(tmp_path: Path) -> None:
    """Its heads have two layers and its classifiers read features; a TF-Hub module holds it."""
    description = architecture(50, stem="imagenet", layers=2, outputs=128, classes=1000)
    model = network(description)
    folder = tmp_path / "ResNet50_1x" / "hub" / "variables"
    folder.mkdir(parents=True)
    (tmp_path / "ResNet50_1x" / "hub" / "saved_model.pb").write_bytes(b"a graph")
    write_bundle(folder / "variables", tf1_variables(model))
    for path in (tmp_path, tmp_path / "ResNet50_1x", folder):
        imported = import_checkpoint(path)
        assert imported.portable.architecture == description
        assert same_bits(imported.portable.model.state_dict(), model.state_dict())
    assert imported.portable.origin == "hub (TF1)"


@pytest.mark.slow
@pytest.mark.parametrize("listed", [False, True], ids=["checkpoint", "saved_model"])
@pytest.mark.parametrize("description", KINDS[1:8], ids=shorthand)
def test_a_network_comes_back_from_objects(
    tmp_path: Path, description: Architecture, listed: bool
) -> None:
    model = network(description)
    variables = tf2_variables(model, listed=listed)
    write_bundle(tmp_path / "ckpt-9", variables)
    imported = import_checkpoint(tmp_path)
    assert imported.portable.architecture == description
    assert imported.naming == "tf2"
    assert imported.portable.preprocessing.resize == "tf2"
    assert same_bits(imported.portable.model.state_dict(), model.state_dict())
    assert imported.variables + imported.skipped == len(variables)
    assert imported.skipped == (1 if listed else 4)  # the graph, and counters


def test_pooled_shortcuts_of_basic_blocks_show_in_objects(tmp_path: Path) -> None:
    """TF1 cannot build basic blocks with selective kernels; TF2 gives them other shortcuts."""
    for stem in ("cifar", "imagenet"):
        description = architecture(18, stem=stem, selective_kernel=True)
        model = network(description)
        write_bundle(tmp_path / stem, tf2_variables(model))
        found = import_checkpoint(tmp_path / stem).portable
        assert found.architecture == description
        assert same_bits(found.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("layer", range(4))
def test_momenta_tell_the_layer_that_the_classifier_reads(
    tmp_path: Path, layer: int, listed: bool
) -> None:
    """Fine-tuning moves the head up to there; the fourth is told by its width."""
    model = network(architecture(layers=3, outputs=16, from_layer=layer))
    reached = ("backbone.", "classifier.", *(f"head.layers.{n}." for n in range(layer)))
    moved = frozenset(
        name for name in model.state_dict() if name.startswith(reached) and ".running_" not in name
    )
    write_bundle(tmp_path / "ckpt-9", tf2_variables(model, listed=listed, moved=moved))
    found = import_checkpoint(tmp_path).portable.architecture.from_layer
    # When all has moved, as in pretraining, they tell nothing.
    assert found == (layer if layer < 3 else 1)


def test_arguments_are_kept(tmp_path: Path, small: Variables) -> None:
    write_bundle(tmp_path / NAME, small)
    names = ("a", "b", "c", "d", "e")
    portable = import_checkpoint(tmp_path, classes=names, image_size=96, resize="tf2").portable
    assert portable.classes == names
    assert portable.preprocessing.image_size == 96
    assert portable.preprocessing.resize == "tf2"
    assert portable.preprocessing.eval_crop_proportion == 0.875


# --- what does not ------------------------------------------------------------------------------


def test_missing_variables_are_named(tmp_path: Path, small: Variables) -> None:
    del small["base_model/conv2d_3/kernel"]
    text = complaint(tmp_path, small)
    assert text.endswith(
        "does not fit the network it resembles most (ResNet-18 0.03125x, no selective kernels, "
        "cifar stem): 'base_model/conv2d_3/kernel' is missing"
    )
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        del small[f"base_model/batch_normalization_3/{name}"]
    text = complaint(tmp_path, small)
    start = "'base_model/batch_normalization_3/"
    assert text.endswith(
        f": 'base_model/conv2d_3/kernel' is missing; {start}gamma' is missing; "
        f"{start}beta' is missing; and 2 more"
    )


@pytest.mark.parametrize(
    "name",
    [
        "base_model/conv2d/kernel",
        "base_model/batch_normalization_19/gamma",
        "head_contrastive/nl_0/dense/kernel",
        "head_contrastive/nl_2/dense/kernel",
        "head_contrastive/nl_1/batch_normalization/beta",
        "head_contrastive/nl_2/batch_normalization/gamma",
        "head_supervised/linear_layer/dense/kernel",
        "head_supervised/linear_layer/dense/bias",
    ],
)
def test_any_one_variable_is_missed(tmp_path: Path, small: Variables, name: str) -> None:
    del small[name]
    assert complaint(tmp_path, small).endswith(f" stem): {name!r} is missing")


def test_a_missing_last_layer_is_missed(tmp_path: Path, small: Variables) -> None:
    left = {name: value for name, value in small.items() if "/nl_2/" not in name}
    text = complaint(tmp_path, left)
    assert "'head_contrastive/nl_2/dense/kernel' is missing; " in text


def test_extra_variables_are_named(tmp_path: Path, small: Variables) -> None:
    extra = np.zeros(3, "float32")
    text = complaint(tmp_path, small | {"base_model/dense/bias": extra})
    assert text.endswith("cifar stem): 'base_model/dense/bias' is not part of it")
    text = complaint(tmp_path, small | {f"new/{number}": extra for number in range(5)})
    assert text.endswith(
        ": 'new/0' is not part of it; 'new/1' is not part of it; 'new/2' is not part of it; "
        "and 2 more"
    )


def test_extra_objects_are_named(tmp_path: Path) -> None:
    model = network(architecture(18))
    key = "model/other/kernel/.ATTRIBUTES/VARIABLE_VALUE"
    text = complaint(tmp_path, tf2_variables(model) | {key: np.zeros(3, "float32")})
    assert text.endswith("cifar stem): 'model/other/kernel' is not part of it")


def test_misshapen_variables_are_named(tmp_path: Path, small: Variables) -> None:
    small["base_model/conv2d_3/kernel"] = np.zeros((3, 3, 2, 5), "float32")
    small["base_model/batch_normalization_4/gamma"] = np.zeros(3, "float32")
    small["head_contrastive/nl_1/dense/kernel"] = np.zeros((16, 12), "float32")
    text = complaint(tmp_path, small)
    assert "'base_model/conv2d_3/kernel' has shape [3, 3, 2, 5], not [3, 3, 2, 2]; " in text
    assert "'base_model/batch_normalization_4/gamma' has shape [3], not [2]; " in text
    assert text.endswith("'head_contrastive/nl_1/dense/kernel' has shape [16, 12], not [16, 16]")


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_wrong_types_are_named(tmp_path: Path, small: Variables, dtype: str) -> None:
    name = "base_model/conv2d_3/kernel"
    kernel = small[name]
    assert isinstance(kernel, np.ndarray)
    text = complaint(tmp_path, small | {name: kernel.astype(dtype)})
    assert text.endswith(f"{name!r} is {dtype}, not float32")


def test_numbers_must_be_finite(tmp_path: Path, small: Variables) -> None:
    name = "head_contrastive/nl_0/batch_normalization/beta"
    for value in (np.nan, np.inf, -np.inf):
        bad = np.zeros(16, "float32")
        bad[5] = value
        text = complaint(tmp_path, small | {name: bad})
        assert text.endswith(f"{name!r} has values that are not finite")


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    numbers = np.zeros((3, 3), "float32")
    text = complaint(tmp_path, {"resnet/conv1": numbers, "global_step": np.array(3, "int64")})
    assert "holds no network of the SimCLR code: 'base_model/" in text
    assert "holds no network" in complaint(
        tmp_path, {"head_contrastive/nl_0/dense/kernel": numbers}
    )
    text = complaint(tmp_path, {"ema_model/base_model/conv2d/kernel": numbers})
    assert "holds no network" in text


def test_contradicting_arguments(tmp_path: Path, small: Variables) -> None:
    write_bundle(tmp_path / NAME, small)
    prefix = tmp_path / NAME
    with pytest.raises(RecipeError, match=r"from_layer 4: the head in .* has 3 layers"):
        import_checkpoint(prefix, from_layer=4)
    with pytest.raises(RecipeError, match="from_layer -1: the head"):
        import_checkpoint(prefix, from_layer=-1)
    with pytest.raises(RecipeError, match=r"from_layer 3: its width is 12, .* reads 16 values"):
        import_checkpoint(prefix, from_layer=3)
    with pytest.raises(RecipeError, match="2 class names for the 5 classes of"):
        import_checkpoint(prefix, classes=("a", "b"))
    for size in (0, -1):
        with pytest.raises(RecipeError, match=f"image_size {size}"):
            import_checkpoint(prefix, image_size=size)
    write_bundle(tmp_path / "none", tf1_variables(network(architecture(classes=None))))
    with pytest.raises(RecipeError, match="has no classifier: leave out from_layer 0"):
        import_checkpoint(tmp_path / "none", from_layer=0)
    with pytest.raises(RecipeError, match="1 class names for the 0 classes"):
        import_checkpoint(tmp_path / "none", classes=("a",))


def test_a_difference_is_found(tmp_path: Path, small: Variables) -> None:
    write_bundle(tmp_path / NAME, small)
    portable = import_checkpoint(tmp_path / NAME).portable
    with torch.no_grad():
        portable.model.backbone.get_parameter("layer2.0.conv1.weight")[0, 1, 2, 0] += 1e-6
    with pytest.raises(CheckpointError, match=r"'backbone\.layer2\.0\.conv1\.weight' is not"):
        compare_with_checkpoint(tmp_path / NAME, portable)
