"""The images and labels of one stage."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigsimclr.augment import ViewSettings, view_settings
from bigsimclr.augment.device import make_views
from bigsimclr.data import EqualImages, Source, Splits, build_data
from bigsimclr.data.decoders import Decoder, choose_decoder
from bigsimclr.data.loader import Batch, Loader, evaluation_batches
from bigsimclr.data.resident import Resident, make_resident
from bigsimclr.data.steps import Means
from bigsimclr.data.subsets import read_list, select_labels, subset_hash
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import DataError
from bigsimclr.kernels import uses_triton
from bigsimclr.recipe.schema import AnyStage, AnyTraining
from bigsimclr.recipe.sections import LabelsSection
from bigsimclr.world import World


@dataclass(frozen=True)
class Inputs:
    """What a stage reads."""

    recipe: AnyStage
    train: Source
    held_out: Source | None
    indices: NDArray[np.int64]  # [M] training images the stage walks through
    labels: NDArray[np.int64]  # [N] labels the stage may see; -1 where hidden or absent
    labelled: NDArray[np.int64]  # [L] training images whose label the stage may see
    label_names: tuple[str, ...] | None  # of the labelled images; None where none is asked for
    settings: ViewSettings
    means: Means
    world: World
    fused: bool  # whether this run computes with the fused kernels
    stop: StopRequest
    left_out: dict[str, str]  # images that evaluation could not read, with the reasons

    @property
    def labels_hash(self) -> str | None:
        """Identify the labelled images by their names."""
        return None if self.label_names is None else subset_hash(self.label_names)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names."""
        return self.train.classes

    def views(self, batch: Batch) -> Tensor:
        """Make the views [V*B,3,H,W] of a batch, on the device."""
        return make_views(
            batch.pixels,
            batch.draws,
            self.settings,
            device=self.world.device,
            fused=self.fused,
        )

    def loader(self, recipe: AnyTraining, *, views: int) -> Loader:
        """Return the endless stream of training batches."""
        return Loader(
            self.train,
            indices=self.indices,
            labels=self.labels,
            settings=self.settings,
            views=views,
            seed=recipe.seed,
            global_batch=recipe.batch.global_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            means=self.means,
            unreadable_limit=recipe.input.unreadable_limit,
            max_pixels=recipe.input.max_pixels,
        )

    def evaluation(
        self, source: Source, indices: NDArray[np.int64], batch_size: int
    ) -> Iterator[Batch]:
        """Walk once through images in order, centre crops.

        Raises:
            Interrupted: a signal asked the run to stop.
        """
        for batch in evaluation_batches(
            source,
            indices=indices,
            settings=self.settings,
            batch_size=batch_size,
            means=self.means,
            unreadable_limit=self.recipe.input.unreadable_limit,
            max_pixels=self.recipe.input.max_pixels,
            unreadable=self.left_out,
        ):
            self.stop.check(self.world)
            yield batch

    def facts(self) -> dict[str, object]:
        """Say what was read, for the result and the report."""
        return {
            "fingerprint": self.train.fingerprint,
            "train": len(self.indices),
            "held_out": 0 if self.held_out is None else len(self.held_out),
            "labels": None if self.label_names is None else len(self.label_names),
            "labels_hash": self.labels_hash,
        }


def open_inputs(
    recipe: AnyStage,
    *,
    labels: LabelsSection | None,
    walk: Literal["labelled", "all"],
    world: World,
    stop: StopRequest,
) -> Inputs:
    """Open the images of a stage and choose whose labels it may see.

    Args:
        recipe: the stage.
        labels: the labelled subset; None shows every label there is.
        walk: "labelled" trains on the labelled images only, "all" on every training image.
        world: this rank, which shows its share of every batch, and its device.
        stop: ends evaluations early.

    Raises:
        DataError: the images or labels are missing or do not fit.
    """
    with world.together():
        splits = _opened(recipe, world.device)
        train = splits.train
        everything = np.arange(len(train), dtype=np.int64)
        if labels is None:
            chosen, names = everything[train.labels >= 0], None
        else:
            chosen = _choose(splits, labels)
            names = tuple(train.name(int(index)) for index in chosen)
        shown = np.full(len(train), -1, dtype=np.int64)
        shown[chosen] = train.labels[chosen]
        settings = view_settings(recipe.augment)
        return Inputs(
            recipe=recipe,
            train=train,
            held_out=splits.held_out,
            indices=chosen if walk == "labelled" else everything,
            labels=shown,
            labelled=chosen,
            label_names=names,
            settings=settings,
            means=_means(recipe, splits.train, settings, world.device),
            world=world,
            fused=uses_triton(recipe.parallel.kernels, world.device),
            stop=stop,
            left_out={},
        )


def _opened(recipe: AnyStage, device: torch.device) -> Splits:
    splits, reading = build_data(recipe.data), recipe.input
    if not reading.resident:
        return splits

    def resident(source: Source) -> Source:
        return make_resident(
            source, device=device, workers=reading.workers, max_pixels=reading.max_pixels
        )

    held_out = None if splits.held_out is None else resident(splits.held_out)
    return replace(splits, train=resident(splits.train), held_out=held_out)


def _means(recipe: AnyStage, train: Source, settings: ViewSettings, device: torch.device) -> Means:
    reading = recipe.input
    decoder: Decoder = "pillow"
    if not isinstance(train, EqualImages | Resident):
        decoder = choose_decoder(reading.decoder, resize=settings.resize, device=device)
    return Means(
        workers=reading.workers,
        prefetch_batches=reading.prefetch_batches,
        device=device,
        decoder=decoder,
    )


def _choose(splits: Splits, labels: LabelsSection) -> NDArray[np.int64]:
    train = splits.train
    if not train.classes:
        raise DataError(
            "labels: this stage needs labels and the images have none; put them into one "
            "sub-folder per class. Without labels you can pretrain and embed"
        )
    return select_labels(
        train,
        per_class=labels.per_class,
        percent=labels.percent,
        names=None if labels.list is None else read_list(labels.list),
        draw=labels.draw,
        list_path=labels.list,
        held_out=splits.held_out,
        held_out_keys=splits.held_out_keys,
    )
