"""Which images are held out, and which may show their label: by class, by draw, or by a list."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Source
from bigsimclr.data.names import counted, printable, some
from bigsimclr.data.places import expanded, require_file
from bigsimclr.errors import DataError
from bigsimclr.randomness import Stream, shuffled

Integers = NDArray[np.int64]


def held_out_count(images: int, fraction: float) -> int:
    """Count the images that a fraction holds out: rounded up, and all but one at most."""
    return min(math.ceil(images * fraction - 1e-9), max(images - 1, 0))


def split_held_out(labels: Integers, *, fraction: float, seed: int) -> tuple[Integers, Integers]:
    """Split images into training and held-out ones, each class in the same proportion.

    Args:
        labels: int64 [N], -1 where there is none; unlabelled images are split like a class.
        fraction: share of the images to hold out.
        seed: seed of the split alone.

    Returns:
        Indices of the training and of the held-out images, both ascending.
    """
    order = _in_proportion(_ranked(labels, seed, Stream.SPLIT), labels)
    count = held_out_count(len(labels), fraction)
    return np.sort(order[count:]), np.sort(order[:count])


def select_labels(
    source: Source,
    *,
    per_class: int | None = None,
    percent: float | None = None,
    names: Sequence[str] | None = None,
    draw: int = 0,
    list_path: Path | None = None,
    held_out: Source | None = None,
    held_out_keys: str = "data.held_out_fraction, data.split_seed",
) -> Integers:
    """Choose the images that show their label.

    Within one draw, a smaller amount of the same kind is contained in a larger one, so that curves
    over the number of labels compare like with like.

    Args:
        source: the training images.
        per_class: images of each class, at random; or
        percent: share of the labelled images, at random in the classes' own proportions: N x
            percent / 100 rounded down (12,811 of ImageNet's 1,281,167 at 1 percent, as in the
            official list), but at least one image of each class; or
        names: names such as `n01440764_10026.JPEG` or `n01440764/n01440764_10026.JPEG`.
        draw: number of the random draw; another number is another, independent choice.
        list_path: file that `names` come from, for messages.
        held_out: images that are not for training, for messages: what is missing may be there.
        held_out_keys: the recipe's keys that hold them out, for messages.

    Returns:
        int64 indices, ascending.

    Raises:
        DataError: there are no labels, a class has fewer images than asked for, or a name is
            unknown, held out, stands for several images, or has no label.
        ValueError: not exactly one of `per_class`, `percent` and `names` is given.
    """
    if [per_class, percent, names].count(None) != 2:
        raise ValueError("give one of per_class, percent and names")
    labelled = np.flatnonzero(source.labels >= 0)
    if not len(labelled):
        raise DataError("these images have no labels, and labels are asked for")
    if names is not None:
        place = "labels.list" if list_path is None else f"labels.list: {printable(str(list_path))}"
        return _listed(source, names, place, held_out, held_out_keys)
    shown = source.labels[labelled]
    ranked = _ranked(shown, draw, Stream.SUBSET)
    if per_class is not None:
        counts = np.bincount(shown, minlength=len(source.classes))
        if counts.min() < per_class:
            poorest = int(counts.argmin())
            apart = 0 if held_out is None else int(np.sum(held_out.labels == poorest))
            rest = f"; {apart} more {_are(apart)} held out ({held_out_keys})" if apart else ""
            raise DataError(
                f"labels.per_class: class '{printable(source.classes[poorest])}' has"
                f" {counted(int(counts[poorest]), 'training image')}, {per_class} per class"
                f" {_are(per_class)} asked for{rest}"
            )
        return labelled[np.flatnonzero(ranked < per_class)]
    order = _in_proportion(ranked, shown, one_of_each_first=True)
    share = len(labelled) * (percent or 0.0) / 100
    count = max(math.floor(share + 1e-9), len(np.unique(shown)))
    return labelled[np.sort(order[:count])]


def write_list(path: Path, names: Sequence[str]) -> None:
    """Write a list of image names, one per line.

    Raises:
        DataError: a name holds a line break and would be read back as two.
    """
    broken = [name for name in names if name.splitlines() != [name]]
    if broken:
        raise DataError(f"names with line breaks cannot be listed: {some(broken)}")
    text = "".join(f"{name}\n" for name in names)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_list(path: Path, *, key: str = "labels.list") -> list[str]:
    """Read a list of image names, one per line; empty lines do not count.

    Raises:
        DataError: the file cannot be read; the message names `key`.
    """
    path = expanded(path, key)
    require_file(path, key, missing_hint=f"give a list of image names with {key}=FILE")
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{key}: {printable(str(path))}: {error.strerror}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def subset_hash(names: Sequence[str]) -> str:
    """Hash a set of image names, whatever their order; sha256 in hex."""
    text = "\n".join(sorted(names))
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()


def _listed(
    source: Source, names: Sequence[str], place: str, held_out: Source | None, held_out_keys: str
) -> Integers:
    """Find images by their name, or by the file name at its end."""
    if not names:
        raise DataError(f"{place}: the list is empty")
    found = _matches(source, names)
    unknown = [name for name, indices in found.items() if not indices]
    if unknown:
        raise DataError(f"{place}: {_why_unknown(unknown, held_out, held_out_keys)}")
    doubtful = [name for name, indices in found.items() if len(indices) > 1]
    if doubtful:
        raise DataError(
            f"{place}: {counted(len(doubtful), 'listed name')}"
            f" {'stands' if len(doubtful) == 1 else 'stand'} for several images: {some(doubtful)};"
            f" write {'it with its' if len(doubtful) == 1 else 'them with their'} folder"
        )
    chosen = np.unique(np.array([indices[0] for indices in found.values()], np.int64))
    bare = [source.name(int(index)) for index in chosen if source.labels[index] < 0]
    if bare:
        raise DataError(
            f"{place}: {counted(len(bare), 'listed image')}"
            f" {'has' if len(bare) == 1 else 'have'} no label: {some(bare)}"
        )
    return chosen


def _matches(source: Source, names: Sequence[str]) -> dict[str, list[int]]:
    wanted = dict.fromkeys(names)
    matches: dict[str, list[int]] = {name: [] for name in wanted}
    full: dict[str, int] = {}
    for index in range(len(source)):
        name = source.name(index)
        file_name = name.rsplit("/", 1)[-1]
        if name in wanted:
            full[name] = index
        if file_name in matches:
            matches[file_name].append(index)
    return {name: [full[name]] if name in full else matches[name] for name in wanted}


def _why_unknown(unknown: list[str], held_out: Source | None, held_out_keys: str) -> str:
    """Say why listed names are not among the training images."""
    found = {} if held_out is None else _matches(held_out, unknown)
    apart = [name for name in unknown if found.get(name)]
    if apart:
        return (
            f"{counted(len(apart), 'listed image')} {_are(len(apart))} held out ({held_out_keys}):"
            f" {some(apart)}; draw the list with the same data keys"
        )
    count = counted(len(unknown), "listed name")
    return f"{count} {_are(len(unknown))} not among the images: {some(unknown)}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _ranked(labels: Integers, seed: int, stream: Stream) -> Integers:
    """Number the images of each class in random order, from 0. Returns int64 [N]."""
    place = np.empty(len(labels), np.int64)
    place[shuffled(seed, stream, len(labels))] = np.arange(len(labels))
    order = np.lexsort((place, labels))
    grouped = labels[order]
    starts = np.flatnonzero(np.concatenate([[True], grouped[1:] != grouped[:-1]]))
    sizes = np.diff(np.concatenate([starts, [len(labels)]]))
    ranked = np.empty(len(labels), np.int64)
    ranked[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return ranked


def _in_proportion(
    ranked: Integers, labels: Integers, *, one_of_each_first: bool = False
) -> Integers:
    """Order all images so that every beginning of the order holds the classes in proportion.

    Image k of a class of n stands at (k + 1/2) / n: Webster's apportionment, which, unlike
    rounding each class by largest remainders, never takes an image away as the total grows.
    """
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    standing = (ranked + 0.5) / counts[numbers]
    late = ranked > 0 if one_of_each_first else np.zeros(len(labels), np.bool_)
    return np.lexsort((numbers, standing, late))
