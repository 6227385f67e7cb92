"""Images that are decoded once and stay on the device: the same batches as from their source."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bigsimclr.augment.device import make_views
from bigsimclr.data import Sample, Source
from bigsimclr.data.arrays import ArraySource
from bigsimclr.data.folder import training_folder
from bigsimclr.data.loader import Batch, evaluation_batches, view_hash
from bigsimclr.data.resident import Resident, make_resident
from bigsimclr.errors import DataError
from tests.data.conftest import Encode
from tests.data.test_loader import CPU, DISTORT, loader


def resident(source: Source, *, workers: int = 0) -> Resident:
    return make_resident(source, device=CPU, workers=workers, max_pixels=10_000)


def views(batch: Batch) -> torch.Tensor:
    return make_views(batch.pixels, batch.draws, DISTORT, device=CPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_s_batches_stay_what_they_were(class_folder: Path, workers: int) -> None:
    source = training_folder(class_folder, ".", labelled=True)
    held = resident(source, workers=workers)
    assert (held.classes, held.fingerprint) == (source.classes, source.fingerprint)
    assert (held.labels == source.labels).all()
    assert [held.name(n) for n in range(len(held))] == [source.name(n) for n in range(len(source))]
    for ours, theirs in zip(loader(held).batches(0, 5), loader(source).batches(0, 5), strict=True):
        assert view_hash(ours) == view_hash(theirs)
        # Cropped on the device here, on the host there: apart by rounding.
        torch.testing.assert_close(views(ours), views(theirs), rtol=0, atol=2e-5)


def test_arrays_give_the_same_bits(pictures: NDArray[np.uint8]) -> None:
    source = ArraySource(pictures, np.arange(len(pictures)))
    held = resident(source)
    for ours, theirs in zip(loader(held).batches(0, 3), loader(source).batches(0, 3), strict=True):
        assert view_hash(ours) == view_hash(theirs)
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(views(ours), views(theirs))
    assert (held.read(2).image == pictures[2]).all()
    assert held.image_size == pictures.shape[1:3]


def test_evaluation_shows_each_image_once(pictures: NDArray[np.uint8]) -> None:
    held = resident(ArraySource(pictures))
    order = np.arange(len(pictures))[::-1].copy()
    batches = list(evaluation_batches(held, indices=order, settings=DISTORT, batch_size=3))
    assert torch.cat([batch.indices for batch in batches]).tolist() == order.tolist()
    shown = torch.cat([batch.pixels for batch in batches]).permute(0, 2, 3, 1)
    assert torch.equal(shown, torch.from_numpy(pictures[order]))


@pytest.mark.parametrize("workers", [0, 1])
def test_other_sizes_are_refused(
    tmp_path: Path, png: Encode, pictures: NDArray[np.uint8], workers: int
) -> None:
    (tmp_path / "a").mkdir()
    for number, picture in enumerate((pictures[0], pictures[1], pictures[2][:-1])):
        (tmp_path / "a" / f"{number}.png").write_bytes(png(picture))
    with pytest.raises(DataError, match=r"2\.png is 8x11 where the first image is 9x11") as caught:
        resident(training_folder(tmp_path, ".", labelled=True), workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named(
    tmp_path: Path, png: Encode, pictures: NDArray[np.uint8], workers: int
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(pictures[0]))
    (tmp_path / "a" / "1.png").write_bytes(png(pictures[1])[:40])
    with pytest.raises(DataError, match=r"input\.resident: a/1\.png cannot be read: ") as caught:
        resident(training_folder(tmp_path, ".", labelled=True), workers=workers)
    assert "Traceback" not in str(caught.value)


def test_sizes_that_change_between_pieces_are_refused(pictures: NDArray[np.uint8]) -> None:
    many = np.repeat(pictures[:1], 600, axis=0)

    class Grown:
        """Array images of which one, in the second piece, is smaller."""

        def __init__(self) -> None:
            self.whole = ArraySource(many)
            self.classes, self.labels = self.whole.classes, self.whole.labels
            self.fingerprint, self.image_size = self.whole.fingerprint, None

        def __len__(self) -> int:
            return len(many)

        def name(self, index: int) -> str:
            return self.whole.name(index)

        def read(self, index: int) -> Sample:
            sample = self.whole.read(index)
            if index < 512:
                return sample
            return Sample(image=sample.image[:4], label=sample.label, index=index)

    with pytest.raises(DataError, match=r"image-000512 is 4x11 where the first image is 9x11"):
        resident(Grown())
