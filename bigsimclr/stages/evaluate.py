"""A network over a whole set of images, without training: logits, features, accuracies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.data import Source
from bigsimclr.engine.metrics import nearest_neighbour_accuracy, top_k_accuracy
from bigsimclr.errors import DataError
from bigsimclr.models.simclr import Outputs, SimCLR
from bigsimclr.stages.inputs import Inputs


@dataclass(frozen=True)
class Extracted:
    """What a network says of a set of images, in the order of the set."""

    features: Tensor  # [N,F] float32, of the head layer asked for
    logits: Tensor | None  # [N,C] float32
    labels: Tensor  # [N] int64


@contextmanager
def inference(model: SimCLR) -> Iterator[None]:
    """Put the model in evaluation mode and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def extract(
    model: SimCLR,
    inputs: Inputs,
    source: Source,
    *,
    indices: NDArray[np.int64] | None = None,
    from_layer: int = 0,
    batch_size: int = 256,
) -> Extracted:
    """Run a model over images, centre crops, in order.

    Args:
        model: the network; its mode is restored afterwards.
        inputs: how the stage makes views.
        source: the images.
        indices: which images; None means all.
        from_layer: head layer whose output counts as the features; 0 is the backbone's.
        batch_size: images per forward pass.

    Raises:
        DataError: there are no images.
    """
    chosen = np.arange(len(source), dtype=np.int64) if indices is None else indices
    features, logits, labels = [], [], []
    with inference(model):
        for batch in inputs.evaluation(source, chosen, batch_size):
            outputs = model(inputs.views(batch))
            features.append(hidden(outputs, from_layer).float().cpu())
            if outputs.logits is not None:
                logits.append(outputs.logits.float().cpu())
            labels.append(batch.labels)
    if not features:
        raise DataError("there is no image to evaluate on")
    return Extracted(
        torch.cat(features),
        torch.cat(logits) if logits else None,
        torch.cat(labels),
    )


def hidden(outputs: Outputs, from_layer: int) -> Tensor:
    """Return the output of a head layer; 0 is the backbone's features."""
    return outputs.features if from_layer == 0 else outputs.projections[from_layer - 1]


def top1(extracted: Extracted) -> float:
    """Return the share of labelled images whose largest logit is their label's."""
    if extracted.logits is None:
        raise AssertionError("the model has no classifier")
    known = extracted.labels >= 0
    return top_k_accuracy(extracted.logits[known], extracted.labels[known])


def held_out_accuracy(model: SimCLR, inputs: Inputs, *, batch_size: int) -> dict[str, float]:
    """Return the classifier's accuracy on the labelled held-out images; empty without any."""
    judged = labelled_held_out(inputs)
    if inputs.held_out is None or not judged.size:
        return {}
    found = extract(model, inputs, inputs.held_out, indices=judged, batch_size=batch_size)
    return {"held_out/accuracy": top1(found)}


def labelled_held_out(inputs: Inputs) -> NDArray[np.int64]:
    """Return the held-out images that have a label, by index."""
    if inputs.held_out is None:
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(inputs.held_out.labels >= 0).astype(np.int64)


def neighbour_accuracy(
    model: SimCLR, inputs: Inputs, *, neighbours: int, from_layer: int, batch_size: int
) -> dict[str, float]:
    """Let the labelled training images vote on the held-out ones; needs both.

    Returns:
        `knn/accuracy`, and `probe/held_out_accuracy` where the model has a classifier.
    """
    judged = labelled_held_out(inputs)
    if inputs.held_out is None or not judged.size:
        return {}
    voters = extract(
        model,
        inputs,
        inputs.train,
        indices=inputs.labelled,
        from_layer=from_layer,
        batch_size=batch_size,
    )
    asked = extract(
        model,
        inputs,
        inputs.held_out,
        indices=judged,
        from_layer=from_layer,
        batch_size=batch_size,
    )
    accuracy = nearest_neighbour_accuracy(
        voters.features,
        voters.labels,
        asked.features,
        asked.labels,
        classes=len(inputs.classes),
        neighbours=neighbours,
    )
    values = {"knn/accuracy": accuracy}
    if asked.logits is not None:
        values["probe/held_out_accuracy"] = top1(asked)
    return values
