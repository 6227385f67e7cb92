"""Commands that use a trained network, bring one in, or take one out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ImagesArgument = Annotated[
    Path, typer.Argument(metavar="IMAGES", help="A folder of images, or one image.")
]
NetworkArgument = Annotated[
    Path,
    typer.Argument(
        metavar="NETWORK", help="A run directory, a checkpoint of one, or a model file."
    ),
]


def embed(
    network: NetworkArgument,
    images: ImagesArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help=".npz file to write.")],
) -> None:
    """Write the features of images."""
    from bigsimclr.stages.embed import embed_to_file

    written = embed_to_file(network, images, out)
    print(f"{out}: features of {_counted(written.images, written.unreadable)}")


def predict(
    network: NetworkArgument,
    images: ImagesArgument,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help=".csv file to write.")
    ] = Path("predictions.csv"),
) -> None:
    """Write the class of every image."""
    from bigsimclr.stages.embed import predict_to_file

    written = predict_to_file(network, images, out)
    print(f"{out}: classes of {_counted(written.images, written.unreadable)}")


def import_tf(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT", help="Its prefix, its folder, its `checkpoint` file, or a SavedModel."
        ),
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help=".safetensors file to write.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read both files again and compare every value.")
    ] = False,
    from_layer: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="What the classifier reads: 0 the features, K the head's layer K; default: as "
            "the .meta file or SavedModel says; else 1 with a head of 3 layers or more, or 0.",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Class names, one a line; default: numbers."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Pixels; default: 224, or 32 with a CIFAR stem."),
    ] = None,
    resize: Annotated[
        Literal["tf1", "tf2"] | None,
        typer.Option(help="Bicubic kernel of its images; default: as the checkpoint's naming."),
    ] = None,
) -> None:
    """Turn an official TensorFlow checkpoint into a model file.

    TensorFlow is not needed. SimCLR and SimCLRv2, pretrained, fine-tuned, distilled or supervised;
    TF1 and TF2 checkpoints and SavedModels. Every checksum in the checkpoint is verified.
    """
    from bigsimclr.stages.convert import import_tf as convert

    converted = convert(
        checkpoint,
        out,
        from_layer=from_layer,
        classes=classes,
        image_size=image_size,
        resize=resize,
        verify=verify,
    )
    print("\n".join([f"{converted.path}: {converted.what}", *converted.notes]))


def export(
    network: NetworkArgument,
    *,
    to: Annotated[
        Literal["torchvision", "timm", "safetensors", "onnx"],
        typer.Option(help="Names of torchvision's or timm's ResNet, our model file, or ONNX."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help=".safetensors or .onnx file.")
    ],
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="With onnx: take uint8 [N,S,S,3] images.")
    ] = False,
) -> None:
    """Write a network for other programs.

    What they must know of it is printed.
    """
    from bigsimclr.stages.convert import export as convert

    converted = convert(network, out, to=to, preprocess=preprocess)
    print("\n".join([f"{converted.path}: {converted.what}", *converted.notes]))


def _counted(images: int, unreadable: tuple[str, ...]) -> str:
    text = f"{images:,} image{'s' * (images != 1)}"
    if not unreadable:
        return text
    names = ", ".join((*unreadable[:3], *(["..."] if len(unreadable) > 3 else [])))
    return f"{text}; {len(unreadable):,} left out, unreadable: {names}"
