"""ONNX files: a network as a graph that runs without PyTorch, compared with it before it is there.

Shapes: N images, S x S pixels.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from bigsimclr.errors import CheckpointError, MissingExtraError, RecipeError
from bigsimclr.interop import PortableModel
from bigsimclr.models.simclr import Outputs, SimCLR
from bigsimclr.storage import whole_file

try:
    import onnx.checker
    import onnxruntime
    import onnxscript  # noqa: F401 - what torch.onnx.export translates with
except ImportError as error:
    raise MissingExtraError(
        "ONNX files need the packages onnx, onnxruntime and onnxscript: "
        "pip install 'bigsimclr[onnx]'"
    ) from error

SUFFIX: Final = ".onnx"
# The default of PyTorch's exporter. Later opsets change none of the operators used but in types
# that are not; onnxruntime 1.32 computes opsets 18 to 26 equally fast, while 1.22 runs opset 22 a
# third slower, for want of blocked convolutions, and refuses 23.
OPSET: Final = 20
TOLERANCE: Final = 1e-4
"""Largest difference to PyTorch, as a share of an output's largest value."""
# Protobuf ends at 2 GiB. PyTorch's exporter insists on weights apart from here on.
EMBEDDED_BYTES: Final = 1536 << 20


@dataclass(frozen=True)
class OnnxExported:
    """An ONNX file that was written and compared with PyTorch."""

    path: Path
    opset: int
    difference: float  # largest over all outputs, as a share of that output's largest value
    notes: tuple[str, ...]  # lines for the user


def export_onnx(
    portable: PortableModel, path: Path, *, with_preprocessing: bool = False
) -> OnnxExported:
    """Write a network as an ONNX graph for any number of images of its one size.

    The input `images` is float32 [batch,3,S,S] in [0, 1]; the outputs are `features`,
    `projection_1` and so on for each layer of the head, and `logits`, as far as they exist. The
    file's metadata say what goes in (`input`, `preprocessing`), and hold `classes`,
    `architecture` and `origin`; `classes`, `preprocessing` and `architecture` are JSON. Weights
    beyond 1.5 GiB go to a second file beside it, `NAME.onnx.data`.

    Args:
        portable: the network and what its images go through.
        path: the `.onnx` file to write; must not exist yet.
        with_preprocessing: `images` is uint8 [batch,S,S,3] instead, RGB as decoders give it,
            resized and cropped already.

    Raises:
        RecipeError: the name does not end in .onnx.
        StorageError: a file is there already, or cannot be written.
        CheckpointError: the network's outputs are not finite, or onnxruntime's differ.
    """
    if path.suffix != SUFFIX:
        raise RecipeError(f"{path}: an {SUFFIX} file is written; choose a name that ends so")
    sample, expected = _sample(portable, as_bytes=with_preprocessing)
    weights_bytes = sum(tensor.nbytes for tensor in portable.model.state_dict().values())
    is_apart = weights_bytes > EMBEDDED_BYTES
    beside = path.with_name(f"{path.name}.data")  # the name that PyTorch's exporter gives
    # Both files are made and compared under their final names, since the graph holds the other's,
    # in a folder of their own. Then the weights go first: no graph is ever there without them.
    with (
        whole_file(path, overwrite=False) as graph,
        whole_file(beside, overwrite=False) if is_apart else nullcontext() as weights,
        TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        made = Path(folder) / path.name
        opset = _write_graph(
            portable, made, sample=sample, outputs=tuple(expected), is_apart=is_apart
        )
        onnx.checker.check_model(str(made), full_check=True)
        difference = _difference(expected, _run(made, sample))
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{path} is not written: onnxruntime {onnxruntime.__version__} computes outputs"
                f" that differ from PyTorch's by {difference:.1e} of the largest value"
                f" ({TOLERANCE:g} at most); try other versions of torch, onnxscript, onnxruntime"
            )
        if weights is not None:
            made.with_name(beside.name).replace(weights)
        made.replace(graph)
    notes = (
        f"input: {_input(portable, as_bytes=with_preprocessing)}",
        f"outputs: {', '.join(expected)}",
        f"opset {opset}; onnxruntime {onnxruntime.__version__} agrees with PyTorch to "
        f"{difference:.1e} of the largest value on a sample",
        *([f"the weights are in {beside.name}: keep the two files together"] if is_apart else []),
    )
    return OnnxExported(path, opset, difference, notes)


class _Exported(nn.Module):
    """A network with tensors alone going in and out, as in a graph."""

    def __init__(self, network: SimCLR, *, takes_bytes: bool) -> None:
        super().__init__()
        self.network = network
        self.takes_bytes = takes_bytes

    @override
    def forward(
        self,
        images: Tensor,  # [N, 3, S, S] in [0, 1]; bytes [N, S, S, 3]
    ) -> tuple[Tensor, ...]:
        if self.takes_bytes:
            images = _scaled(images)
        return tuple(_named(self.network(images)).values())


def _scaled(
    pixels: Tensor,  # uint8 [N, S, S, 3]
) -> Tensor:  # float32 [N, 3, S, S] in [0, 1]
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 255


def _named(outputs: Outputs) -> dict[str, Tensor]:
    named = {"features": outputs.features}
    for number, projection in enumerate(outputs.projections, start=1):
        named[f"projection_{number}"] = projection
    if outputs.logits is not None:
        named["logits"] = outputs.logits
    return named


def _sample(portable: PortableModel, *, as_bytes: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw three images, and compute what PyTorch makes of them."""
    size = portable.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, size, size, 3), dtype=torch.uint8, generator=generator)
    images = _scaled(pixels)
    with torch.no_grad():
        expected = _named(portable.model(images))
    for name, output in expected.items():
        if not output.isfinite().all():
            raise CheckpointError(f"the network's {name} are not finite: its weights are damaged")
    return (pixels if as_bytes else images), expected


def _write_graph(
    portable: PortableModel,
    path: Path,
    *,
    sample: Tensor,  # [3, 3, S, S], or bytes [3, S, S, 3]
    outputs: Sequence[str],
    is_apart: bool,
) -> int:
    """Write the graph, and if so wanted its weights beside it; return its opset."""
    as_bytes = sample.dtype == torch.uint8
    with _silent_exporter():
        program = torch.onnx.export(
            _Exported(portable.model, takes_bytes=as_bytes).eval(),
            (sample,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
        )
        assert program is not None  # noqa: S101 - None is the older exporter's answer
        graph = program.model.graph
        # The exporter notes at each node which lines of which files made it, paths and all.
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
        program.model.metadata_props.clear()
        program.model.metadata_props.update(
            {
                "input": _input(portable, as_bytes=as_bytes),
                "preprocessing": json.dumps(asdict(portable.preprocessing)),
                "classes": json.dumps(portable.classes),
                "architecture": portable.architecture.to_json(),
                "origin": portable.origin,
            }
        )
        program.save(path, external_data=is_apart)
    return int(program.model.opset_imports[""])


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Keep the exporter's remarks on its own workings from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _run(
    graph: Path,
    sample: Tensor,  # [3, 3, S, S], or bytes [3, S, S, 3]
) -> dict[str, NDArray[np.float32]]:
    """Compute all outputs with onnxruntime: of the images one by one, then joined.

    A graph whose batch size is not free, or whose images touch each other, is found out so.
    """
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    parts = [session.run(names, {"images": piece.numpy()}) for piece in (sample[:1], sample[1:])]
    return {
        name: np.concatenate(rows)
        for name, rows in zip(names, zip(*parts, strict=True), strict=True)
    }


def _difference(
    expected: Mapping[str, Tensor],  # any shapes [...]
    found: Mapping[str, NDArray[np.float32]],
) -> float:
    """Return the largest difference over all outputs, as a share of an output's largest value."""
    shares = []
    for name, output in expected.items():
        ours = output.numpy()
        largest = float(np.abs(ours).max()) or 1.0
        shares.append(float(np.abs(found[name] - ours).max()) / largest)
    return max(shares)


def _input(portable: PortableModel, *, as_bytes: bool) -> str:
    """Say in one line what the graph takes."""
    prepared = portable.preprocessing
    size = prepared.image_size
    if as_bytes:
        return f"uint8 [batch,{size},{size},3], RGB in 0..255; before it: {prepared.in_words()}"
    return (
        f"float32 [batch,3,{size},{size}] in [0,1], RGB, no mean or deviation subtracted; "
        f"before it: {prepared.in_words()}"
    )
