"""Where the images of a recipe come from: one section for each kind of source."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from bigsimclr.recipe.sections import Section, UserPath


class DigitsData(Section):
    """The 1,797 scanned 8x8 digits that scikit-learn carries: real data without a download."""

    kind: Literal["digits"]
    """Selects the bundled digits."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of every class kept for evaluation only; chosen by `split_seed`."""
    split_seed: NonNegativeInt = 0
    """Seed of the held-out split; not `seed`, so that all stages hold out the same images."""


class ArraysData(Section):
    """A NumPy .npz file with `images` (uint8 [N,H,W,3] or [N,H,W]) and optionally `labels` [N]."""

    kind: Literal["arrays"]
    """Selects NumPy arrays."""
    root: UserPath
    """Path of the .npz file, relative to the current directory; ~ is the home folder. The file
    holds `images`, uint8 [N,H,W,3] (RGB) or [N,H,W] (grey), and perhaps `labels`, whole numbers
    [N], one for each image: the class from 0, or -1 for none. Other types are refused."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of every class kept for evaluation only; chosen by `split_seed`."""
    split_seed: NonNegativeInt = 0
    """Seed of the held-out split; not `seed`, so that all stages hold out the same images."""


class FolderData(Section):
    """Images in a folder: one sub-folder per class, or no labels at all, read recursively."""

    kind: Literal["folder"]
    """Selects a folder of images."""
    root: UserPath
    """The folder that holds the images, or the `train` and `held_out` folders; relative to the
    current directory, ~ is the home folder."""
    train: str = "."
    """Folder of the training images, relative to `root`."""
    held_out: str | None = None
    """Folder of the held-out images, relative to `root`; null when there is none."""
    manifest: UserPath | None = None
    """A list of the images below `root`, written by `bigsimclr data index`, which spares walking
    through millions of files at every start; one that is out of date is refused. null: walk."""
    labelled: bool = True
    """True: the first sub-folder below `train` names the class. False: no labels, any nesting."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of every class kept for evaluation when `held_out` is null; chosen by `split_seed`."""
    split_seed: NonNegativeInt = 0
    """Seed of the held-out split; not `seed`, so that all stages hold out the same images."""


class ParquetData(Section):
    """Parquet files in the Hugging Face layout: `image` {bytes, path} and, if there, `label`."""

    kind: Literal["parquet"]
    """Selects parquet files (extra `parquet`)."""
    root: UserPath
    """The folder that holds the parquet files; relative to the current directory, ~ is the home
    folder."""
    train: str = "train*.parquet"
    """Pattern of the training files, relative to `root`."""
    held_out: str | None = None
    """Pattern of the held-out files, relative to `root`; null when there are none."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of every class kept for evaluation when `held_out` is null; chosen by `split_seed`."""
    split_seed: NonNegativeInt = 0
    """Seed of the held-out split; not `seed`, so that all stages hold out the same images."""


class ShardsData(Section):
    """Tar shards in the WebDataset layout: `KEY.jpg` and, if there, `KEY.cls` or `KEY.json`."""

    kind: Literal["shards"]
    """Selects tar shards, as `bigsimclr data pack` and others write them."""
    root: UserPath
    """The folder that holds the shards, or with `remote` copies of them; relative to the current
    directory, ~ is the home folder."""
    remote: str | None = None
    """URL of the folder of shards, such as s3://bucket/set (extra `remote`, and fsspec's package
    for the protocol): each shard is copied to `root` when it is first needed, and stays there.
    null: they lie in `root`."""
    train: str = "*.tar"
    """Pattern of the training shards, relative to `root`."""
    held_out: str | None = None
    """Pattern of the held-out shards, relative to `root`; null when there are none."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of every class kept for evaluation when `held_out` is null; chosen by `split_seed`."""
    split_seed: NonNegativeInt = 0
    """Seed of the held-out split; not `seed`, so that all stages hold out the same images."""
    order: Literal["uniform", "runs"] = "uniform"
    """uniform: every image may follow every other one. runs: the shards in random order, the
    images of `window` shards shuffled together; for spinning disks, network disks and `remote`.
    Their classes should be mixed within the shards, as `bigsimclr data pack` does."""
    window: PositiveInt = 8
    """Shards that `order: runs` shuffles together; they should fit into memory."""


SourceSection = Annotated[
    DigitsData | ArraysData | FolderData | ParquetData | ShardsData, Field(discriminator="kind")
]


class MixedSource(Section):
    """One source of a mixture."""

    weight: PositiveFloat | None = None
    """Share of the examples seen, in proportion to the other weights; null for all sources: every
    image is seen equally often."""
    data: SourceSection
    """The images and what they hold out, with the keys that `data` has for their kind."""


class MixData(Section):
    """Several sources, each seen in a given share."""

    kind: Literal["mix"]
    """Selects a mixture of sources."""
    sources: Annotated[tuple[MixedSource, ...], Field(min_length=1)]
    """The sources. An epoch is as many examples as they have images together. With weights, small
    sources come round several times in it, and large ones in part: each goes through all its
    images, in an order of its own, before one comes again. Classes of one name are one class."""

    @model_validator(mode="after")
    def _all_weights(self) -> Self:
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError("give every source a weight, or none")
        shards = [one.data for one in self.sources if isinstance(one.data, ShardsData)]
        if None in weights and any(data.order == "runs" for data in shards):
            raise ValueError("order: runs needs a weight for every source")
        return self


DataSection = Annotated[
    DigitsData | ArraysData | FolderData | ParquetData | ShardsData | MixData,
    Field(discriminator="kind"),
]
