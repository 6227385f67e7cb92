"""The loader on real photographs, where a copy is at hand."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import make_views
from bigsimclr.data import build_data, count_examples
from bigsimclr.data.loader import Batch, Loader, evaluation_batches, view_hash
from bigsimclr.data.steps import Means
from bigsimclr.recipe.sections import FolderData, ParquetData

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / os.environ.get("BIGSIMCLR_TEST_DATA", "../shared/data")
SHARDS = sorted((DATA / "imagenet-sample").glob("*.tar"))
CIFAR10 = DATA / "cifar10"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight JPEGs of one shard, a folder for each class."""
    if not SHARDS:
        pytest.skip(f"no photographs in {DATA}")
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(SHARDS[0]) as shard:
        members = [member for member in shard if member.name.endswith(".jpg")][:8]
        for member in members:
            content = shard.extractfile(member)
            assert content is not None
            folder = root / Path(member.name).stem.split("_")[0]
            folder.mkdir(exist_ok=True)
            (folder / Path(member.name).name).write_bytes(content.read())
    return root


def test_photographs_become_views_of_224_pixels(photographs: Path) -> None:
    source = build_data(FolderData(kind="folder", root=photographs)).train
    settings = ViewSettings(
        image_size=224,
        colour_strength=1.0,
        colour_probability=0.8,
        grey_probability=0.2,
        blur_probability=0.5,
    )
    found = []
    for workers in (0, 2):
        loader = Loader(
            source,
            indices=np.arange(len(source)),
            labels=source.labels,
            settings=settings,
            views=2,
            seed=0,
            global_batch=4,
            means=Means(workers=workers),
        )
        found.append(Batch.join(list(loader.batches(6, 2))))
        assert not loader.unreadable
    assert view_hash(found[0]) == view_hash(found[1])
    assert torch.equal(found[0].pixels, found[1].pixels)
    views = make_views(found[0].pixels, found[0].draws, settings, device=CPU)
    assert views.shape == (16, 3, 224, 224)
    assert 0 <= views.min() < views.max() <= 1
    # Photographs, not noise and not black: views of one image differ from those of another.
    assert 0.1 < views.mean() < 0.9
    assert views.flatten(1).std(dim=1).min() > 0.01


def test_photographs_are_evaluated_at_their_centre(photographs: Path) -> None:
    source = build_data(FolderData(kind="folder", root=photographs)).train
    settings = ViewSettings(image_size=224)
    (batch,) = evaluation_batches(source, indices=np.arange(3), settings=settings, batch_size=8)
    assert batch.pixels.shape == (1, 3, 3, 224, 224)
    heights, widths = batch.draws.boxes[0, :, 2], batch.draws.boxes[0, :, 3]
    assert np.array_equal(heights, widths)


def test_cifar10_is_read_from_parquet() -> None:
    pytest.importorskip("pyarrow")
    if not CIFAR10.is_dir():
        pytest.skip(f"no CIFAR-10 in {DATA}")
    section = ParquetData(
        kind="parquet", root=CIFAR10, train="test*.parquet", held_out_fraction=0.1
    )
    assert count_examples(section) == (9000, 1000)
    splits = build_data(section)
    assert splits.held_out is not None
    assert splits.train.classes[:2] == ("airplane", "automobile")
    assert np.bincount(splits.held_out.labels).tolist() == [100] * 10
    settings = ViewSettings(image_size=32, colour_strength=0.5, colour_probability=0.8)
    hashes = set()
    for workers in (0, 2):
        loader = Loader(
            splits.train,
            indices=np.arange(9000),
            labels=splits.train.labels,
            settings=settings,
            views=2,
            seed=0,
            global_batch=96,
            means=Means(workers=workers),
        )
        batch = Batch.join(list(loader.batches(8990, 2)))
        assert batch.pixels.shape == (2, 192, 3, 32, 32)
        hashes.add(view_hash(batch))
    assert len(hashes) == 1
