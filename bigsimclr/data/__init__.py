"""Where images come from: the vocabulary of sources, and the one place that builds them.

Importing this package never imports torch, so that `bigsimclr check` can count images.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, assert_never, runtime_checkable

from bigsimclr.recipe.sources import (
    ArraysData,
    DataSection,
    DigitsData,
    FolderData,
    MixData,
    ParquetData,
    ShardsData,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Choosy",
    "EqualImages",
    "Sample",
    "Source",
    "Splits",
    "build_data",
    "count_examples",
]


@dataclass(frozen=True)
class Sample:
    """One image as its source stores it, not yet decoded."""

    image: "bytes | NDArray[np.uint8]"  # an encoded file, or uint8 [H, W, 3]
    label: int  # class number, -1 when there is none
    index: int  # position in the source


class Source(Protocol):
    """Images by index. A source knows nothing of order, ranks, subsets or views."""

    classes: tuple[str, ...]  # class names by number; empty when the images have no labels
    labels: "NDArray[np.int64]"  # [N] class numbers, -1 where there is none
    fingerprint: str  # sha256 (hex) of what the source holds: names, sizes, labels
    image_size: (
        tuple[int, int] | None
    )  # (height, width) where all images are equal arrays, else None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name image `index` for people and list files; unique within the source."""
        ...

    def read(self, index: int) -> Sample:
        """Read image `index`; raises OSError or DataError when it cannot be read."""
        ...


@runtime_checkable
class EqualImages(Source, Protocol):
    """A source in memory whose images are all the same size: a batch is one gather."""

    def read_many(self, indices: "NDArray[np.int64]") -> "NDArray[np.uint8]":
        """Return the images of `indices` as one array [B, H, W, 3]."""
        ...


@runtime_checkable
class Choosy(Source, Protocol):
    """A source that found more than images."""

    left_out: "Mapping[str, str]"  # name -> reason, of entries that only have an image's name
    skipped: "Mapping[str, int]"  # suffix -> files that have no image's name


class _Divisible(Source, Protocol):
    def take(self, rows: "NDArray[np.int64]") -> Self:
        """Return a source of `rows` alone; names stay."""
        ...


@dataclass(frozen=True)
class Splits:
    """The images of a recipe."""

    train: Source
    held_out: Source | None  # never trained on; None when there are none
    held_out_keys: str = ""  # the recipe's keys that hold them out, for messages


def build_data(section: DataSection) -> Splits:
    """Open the images that a recipe names, and hold out what it says.

    Raises:
        DataError: there are no images, or they do not fit the section.
        MissingExtraError: parquet files, and pyarrow is not installed.
    """
    match section:
        case DigitsData():
            from bigsimclr.data.arrays import digits

            splits = _split(digits(), section)
        case ArraysData():
            from bigsimclr.data.arrays import load_arrays
            from bigsimclr.data.places import expanded

            splits = _split(load_arrays(expanded(section.root, "data.root")), section)
        case FolderData():
            splits = _folder(section)
        case ParquetData():
            splits = _parquet(section)
        case ShardsData():
            splits = _shards(section)
        case MixData():
            splits = _mixture(section)
        case _:
            assert_never(section)
    return splits


def count_examples(section: DataSection) -> tuple[int, int]:
    """Count training and held-out images without reading any pixel.

    Raises:
        DataError: there are no images, or they do not fit the section.
        MissingExtraError: parquet files, and pyarrow is not installed.
    """
    from bigsimclr.data.places import expanded

    if isinstance(section, MixData):
        counts = [count_examples(source.data) for source in section.sources]
        return sum(train for train, _ in counts), sum(apart for _, apart in counts)
    match section:
        case DigitsData():
            from bigsimclr.data.arrays import DIGITS

            images, apart = DIGITS, None
        case ArraysData():
            from bigsimclr.data.arrays import count_arrays

            images, apart = count_arrays(expanded(section.root, "data.root")), None
        case FolderData() | ParquetData() | ShardsData():
            images = _count_files(section, section.train)
            apart = None
            if section.held_out is not None:
                apart = _count_files(section, section.held_out, key="data.held_out")
        case _:
            assert_never(section)
    if apart is None:
        from bigsimclr.data.subsets import held_out_count

        apart = held_out_count(images, section.held_out_fraction)
        return images - apart, apart
    return images, apart


def _folder(section: FolderData) -> Splits:
    from bigsimclr.data.folder import held_out_folder, training_folder
    from bigsimclr.data.places import expanded

    root = expanded(section.root, "data.root")
    manifest = section.manifest and expanded(section.manifest, "data.manifest")
    images = training_folder(root, section.train, labelled=section.labelled, manifest=manifest)
    if section.held_out is None:
        return _split(images, section)
    apart = held_out_folder(images, root, section.held_out, manifest=manifest)
    return Splits(images, apart, "data.held_out")


def _parquet(section: ParquetData) -> Splits:
    from bigsimclr.data.parquet import FILES, open_parquet
    from bigsimclr.data.places import expanded, matching_files, refuse_overlap

    root = expanded(section.root, "data.root")
    rows = open_parquet(root, section.train)
    if section.held_out is None:
        return _split(rows, section)
    refuse_overlap(
        matching_files(root, section.train, key="data.train", what=FILES),
        matching_files(root, section.held_out, key="data.held_out", what=FILES),
        pattern=section.train,
    )
    apart = open_parquet(root, section.held_out, classes=rows.classes, key="data.held_out")
    return Splits(rows, apart, "data.held_out")


def _shards(section: ShardsData) -> Splits:
    from bigsimclr.data.places import expanded, refuse_overlap
    from bigsimclr.data.shards import open_shards

    root = expanded(section.root, "data.root")
    window = section.window if section.order == "runs" else None
    images = open_shards(root, section.train, window=window, remote=section.remote)
    if section.held_out is None:
        return _split(images, section)
    apart = open_shards(
        root,
        section.held_out,
        classes=images.classes,
        key="data.held_out",
        remote=section.remote,
    )
    refuse_overlap(images.paths, apart.paths, pattern=section.train)
    return Splits(images, apart, "data.held_out")


def _mixture(section: MixData) -> Splits:
    from bigsimclr.data.mixture import mixed, one_behind_the_other

    found = [build_data(source.data) for source in section.sources]
    train = mixed([splits.train for splits in found], [source.weight for source in section.sources])
    apart = [splits.held_out for splits in found if splits.held_out is not None]
    held_out = one_behind_the_other(apart, train) if apart else None
    return Splits(train, held_out, "data.sources")


def _count_files(
    section: FolderData | ParquetData | ShardsData, part: str, key: str = "data.train"
) -> int:
    from bigsimclr.data.places import expanded

    root = expanded(section.root, "data.root")
    match section:
        case FolderData():
            from bigsimclr.data.folder import count_folder

            labelled = section.labelled and key == "data.train"
            manifest = section.manifest and expanded(section.manifest, "data.manifest")
            return count_folder(root, part, labelled=labelled, key=key, manifest=manifest)
        case ParquetData():
            from bigsimclr.data.parquet import count_parquet

            return count_parquet(root, part, key=key)
        case ShardsData():
            from bigsimclr.data.shards import count_shards

            return count_shards(root, part, key=key, remote=section.remote)
        case _:
            assert_never(section)


def _split(
    source: _Divisible, section: DigitsData | ArraysData | FolderData | ParquetData | ShardsData
) -> Splits:
    from bigsimclr.data.subsets import split_held_out

    if section.held_out_fraction == 0:
        return Splits(source, None)
    train, apart = split_held_out(
        source.labels, fraction=section.held_out_fraction, seed=section.split_seed
    )
    return Splits(
        source.take(train),
        source.take(apart) if len(apart) else None,
        "data.held_out_fraction, data.split_seed",
    )
