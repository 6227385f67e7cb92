"""Networks in and out: official checkpoints to model files, networks to other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

from bigsimclr.data.subsets import read_list
from bigsimclr.errors import RecipeError
from bigsimclr.interop import PortableModel
from bigsimclr.interop.model_file import read_model_file, write_model_file
from bigsimclr.models import Architecture
from bigsimclr.stages.load import load_network


@dataclass(frozen=True)
class Converted:
    """A file that was written, and what there is to know about it."""

    path: Path
    what: str  # one line: what the file holds
    notes: tuple[str, ...]  # lines for the user


def import_tf(
    checkpoint: Path | str,
    out: Path | str,
    *,
    from_layer: int | None = None,
    classes: Path | str | None = None,
    image_size: int | None = None,
    resize: Literal["tf1", "tf2"] | None = None,
    verify: bool = False,
) -> Converted:
    """Turn an official TensorFlow checkpoint into a model file, without TensorFlow.

    Args:
        checkpoint: the checkpoint's prefix, its folder, its `checkpoint` file, or a SavedModel.
        out: the `.safetensors` file to write; must not exist yet. `load_model` reads it, and it
            can be the parent of a run.
        from_layer: head layer that the classifier reads; None: as the `.meta` file or SavedModel
            has it, and without these 1 with a head of 3 layers or more (SimCLRv2 fine-tuned on few
            labels), else 0.
        classes: text file with the names of the classifier's outputs, one a line; None: numbers.
        image_size: side of the images in pixels; None: 224, or 32 with a CIFAR stem.
        resize: bicubic kernel the network's images were made with; None: as the naming says.
        verify: read both files again and compare every value.

    Raises:
        CheckpointError: the checkpoint is damaged, or is no SimCLR network.
        RecipeError: an option does not fit the network.
        DataError: the class names cannot be read.
        StorageError: `out` is there already, or cannot be written.
    """
    from bigsimclr.interop.tf_checkpoint import compare_with_checkpoint, import_checkpoint

    path = Path(out)
    imported = import_checkpoint(
        Path(checkpoint),
        from_layer=from_layer,
        classes=None if classes is None else tuple(read_list(Path(classes), key="--classes")),
        image_size=image_size,
        resize=resize,
    )
    write_model_file(path, imported.portable)
    notes = [
        f"from {imported.prefix}: {imported.variables} variables ({imported.naming.upper()} names, "
        f"checksums verified), {imported.skipped} skipped (momentum, counters, copies)",
        *_notes(imported.portable),
    ]
    architecture = imported.portable.architecture
    if architecture.classes is not None and architecture.head is not None and from_layer is None:
        layer = _layer(architecture.from_layer)
        notes.append(
            f"the classifier reads {layer}, as the graph beside the variables says"
            if imported.layer_is_recorded
            else f"the classifier is taken to read {layer}, which this checkpoint does not record; "
            "--from-layer chooses another"
        )
    if verify:
        compared = compare_with_checkpoint(imported.prefix, read_model_file(path))
        notes.append(f"verified: {compared} tensors read again, each bit as in the checkpoint")
    return Converted(path, _what(architecture), tuple(notes))


def export(
    network: Path | str,
    out: Path | str,
    *,
    to: Literal["torchvision", "timm", "safetensors", "onnx"],
    preprocess: bool = False,
) -> Converted:
    """Write a network for other programs.

    Args:
        network: a run directory, a checkpoint of one, or a model file.
        out: the file to write; must not exist yet.
        to: torchvision, timm: a `.safetensors` file with the names of their ResNets, for networks
            without selective kernels and with the ImageNet stem; safetensors: a model file that
            `load_model` reads; onnx: a graph with a free batch size (extra `onnx`).
        preprocess: onnx only: the graph takes uint8 images [N,S,S,3] instead of [N,3,S,S] in [0,1].

    Raises:
        RecipeError: that format cannot express the network; the message says why.
        CheckpointError: the network cannot be read.
        StorageError: `out` is there already, or cannot be written.
        MissingExtraError: onnx, and its packages are not installed.
    """
    path, portable = Path(out), load_network(Path(network)).portable
    held = portable.architecture
    if preprocess and to != "onnx":
        raise RecipeError(f"--preprocess changes an ONNX graph; --to {to} writes weights alone")
    match to:
        case "safetensors":
            write_model_file(path, portable)
            notes = (*_notes(portable), f"load: bigsimclr.load_model({str(path)!r})")
        case "torchvision" | "timm":
            from bigsimclr.interop.export import export_names

            notes = export_names(portable, path, to=to).notes
            classes = held.classes if held.from_layer == 0 else None
            held = Architecture(held.backbone, None, classes, from_layer=0)
        case "onnx":
            from bigsimclr.interop.onnx_file import export_onnx

            notes = export_onnx(portable, path, with_preprocessing=preprocess).notes
        case _:
            assert_never(to)
    return Converted(path, _what(held), notes)


def _what(architecture: Architecture) -> str:
    backbone, head = architecture.backbone, architecture.head
    parts = [
        f"ResNet-{backbone.depth} {backbone.width:g}x"
        f"{' with selective kernels' if backbone.selective_kernel else ''}, {backbone.stem} stem"
    ]
    if head is not None and architecture.keep_head_layers != 0:
        kept = architecture.keep_head_layers
        whole = f"head of {head.layers} layers to {head.output_width}"
        parts.append(whole if kept is None else f"first {kept} of a {whole}")
    if architecture.classes is not None:
        parts.append(
            f"{architecture.classes:,} classes from {_layer(architecture.from_layer)}",
        )
    return "; ".join(parts)


def _layer(number: int) -> str:
    return f"head layer {number}" if number else "the features"


def _notes(portable: PortableModel) -> tuple[str, ...]:
    size = portable.preprocessing.image_size
    return (
        f"input: float32 [N,3,{size},{size}] in [0,1], RGB, no mean or deviation subtracted; "
        f"before it: {portable.preprocessing.in_words()}",
    )
