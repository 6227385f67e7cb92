"""Accuracy of class logits, and of nearest neighbours among features."""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def top_k_correct(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # int64 [N]
    *,
    k: int = 1,
) -> Tensor:
    """Return for each image whether its label is among its k highest logits, bool [N]."""
    if k == 1:
        return logits.argmax(1) == labels
    highest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (highest == labels[:, None]).any(1)


def top_k_accuracy(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # int64 [N]
    *,
    k: int = 1,
) -> float:
    """Return the share of images whose label is among their k highest logits.

    Raises:
        ValueError: If there is no image.
    """
    if len(labels) == 0:
        raise ValueError("accuracy of no image")
    return float(top_k_correct(logits, labels, k=k).double().mean())


@torch.no_grad()
def nearest_neighbour_accuracy(
    train_features: Tensor,  # [N, F]
    train_labels: Tensor,  # int64 [N]
    test_features: Tensor,  # [M, F]
    test_labels: Tensor,  # int64 [M]
    *,
    classes: int,
    neighbours: int,
    temperature: float = 0.1,
    chunk: int = 512,
) -> float:
    """Classify each test image by a vote of its nearest training images, weighted by similarity.

    The `neighbours` training features of highest cosine vote for their class with weight
    exp(cosine / temperature). Equal votes go to the lower class.

    Args:
        train_features: Features that vote; need not be normalised.
        train_labels: Their classes.
        test_features: Features that are classified.
        test_labels: Their true classes.
        classes: Number of classes.
        neighbours: Votes per image; all training images where there are fewer.
        temperature: Of the votes; dimensionless.
        chunk: Test images at a time; bounds memory to chunk x N similarities.

    Returns:
        Share of test images whose class won.

    Raises:
        ValueError: If there is nothing to compare.

    Source: arXiv 1805.01978 section 3.4.
    """
    if len(train_labels) == 0 or len(test_labels) == 0:
        raise ValueError(f"{len(train_labels)} features to compare with {len(test_labels)}")
    reference = F.normalize(train_features, dim=1)
    votes_each = min(neighbours, len(reference))
    correct = 0
    for start in range(0, len(test_labels), chunk):
        rows = slice(start, start + chunk)
        cosine = F.normalize(test_features[rows], dim=1) @ reference.T
        nearest = cosine.topk(votes_each, dim=1)
        # Less 1 / temperature: the same order of votes, and no overflow at small temperatures.
        weights = ((nearest.values - 1.0) / temperature).exp()
        votes = weights.new_zeros(len(weights), classes)
        votes.scatter_add_(1, train_labels[nearest.indices], weights)
        correct += int((votes.argmax(1) == test_labels[rows]).sum())
    return correct / len(test_labels)
