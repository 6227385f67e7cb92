"""The loader on real photographs, where a copy is at hand."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import make_views
from bigsimclr.data import build_data, count_examples
from bigsimclr.data.alike import look_of
from bigsimclr.data.decode import decode
from bigsimclr.data.folder import found_folder, training_folder
from bigsimclr.data.loader import Batch, Loader, evaluation_batches, view_hash
from bigsimclr.data.pack import pack
from bigsimclr.data.scan import scan
from bigsimclr.data.steps import Means
from bigsimclr.recipe.sources import FolderData, ParquetData, ShardsData

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


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All photographs: their shards, linked where an index may be written, and as files."""
    if not SHARDS:
        pytest.skip(f"no photographs in {DATA}")
    shards = tmp_path_factory.mktemp("shards")
    folder = tmp_path_factory.mktemp("files")
    for path in SHARDS:
        (shards / path.name).symlink_to(path.resolve())
        with tarfile.open(path) as shard:
            members = {member.name: member for member in shard}
            for name, member in members.items():
                if name.endswith(".jpg"):
                    label = shard.extractfile(members[f"{name[:-4]}.cls"])
                    content = shard.extractfile(member)
                    assert label is not None
                    assert content is not None
                    place = folder / f"{int(label.read()):04d}" / name
                    place.parent.mkdir(exist_ok=True)
                    place.write_bytes(content.read())
    return shards, folder


def test_a_thousand_photographs_are_the_same_from_shards(
    thousand: tuple[Path, Path], tmp_path: Path
) -> None:
    shards, folder = thousand
    files = build_data(FolderData(kind="folder", root=folder)).train
    given = build_data(ShardsData(kind="shards", root=shards)).train
    pack(training_folder(folder, ".", labelled=True), tmp_path / "pack", shard_bytes=30 << 20)
    packed = build_data(ShardsData(kind="shards", root=tmp_path / "pack")).train
    assert len(files) == len(given) == len(packed) == 1000
    assert packed.fingerprint == files.fingerprint
    by_name = {given.name(index): index for index in range(1000)}
    for index in range(1000):
        sample = files.read(index)
        assert packed.read(index) == sample
        other = given.read(by_name[files.name(index).partition("/")[2]])
        assert (other.image, other.label) == (sample.image, sample.label)


@pytest.mark.slow
def test_photographs_have_one_view_hash_from_files_and_from_shards(
    thousand: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = thousand[1]
    pack(training_folder(folder, ".", labelled=True), tmp_path / "pack", shard_bytes=30 << 20)
    settings = ViewSettings(image_size=32, colour_strength=1.0, colour_probability=0.8)
    found = set()
    for section in (
        FolderData(kind="folder", root=folder),
        ShardsData(kind="shards", root=tmp_path / "pack"),
    ):
        source = build_data(section).train
        for workers in range(4):
            loader = Loader(
                source,
                indices=np.arange(len(source)),
                labels=source.labels,
                settings=settings,
                views=2,
                seed=0,
                global_batch=32,
                means=Means(workers=workers),
            )
            batch = Batch.join(list(loader.batches(984, 2)))
            assert not loader.unreadable
            found.add((view_hash(batch), batch.pixels.numpy().tobytes()))
    assert len(found) == 1


@pytest.mark.slow
def test_a_thousand_photographs_are_scanned(tmp_path: Path) -> None:
    if not SHARDS:
        pytest.skip(f"no photographs in {DATA}")
    for path in SHARDS:
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".jpg"):
                    content = shard.extractfile(member)
                    assert content is not None
                    (tmp_path / Path(member.name).name).write_bytes(content.read())
    found = scan(found_folder(tmp_path), max_pixels=64_000_000, workers=2)
    assert found.train.images == 1000
    assert found.broken == ()
    assert found.formats == {"JPEG": 1000}
    assert found.modes == {"RGB": 977, "L": 23}
    assert (found.copies, found.alike) == ((), ())
    assert found.train.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.slow
def test_copies_of_photographs_are_found(tmp_path: Path) -> None:
    if not SHARDS:
        pytest.skip(f"no photographs in {DATA}")
    kinds = ("halved", "saved", "cut")
    count = 0
    for path in SHARDS[::3]:
        with tarfile.open(path) as shard:
            for member in shard:
                if not member.name.endswith(".jpg"):
                    continue
                content = shard.extractfile(member)
                assert content is not None
                name, stored = Path(member.name).name, content.read()
                image = Image.fromarray(decode(stored, max_pixels=64_000_000))
                right, low = image.width, image.height
                changed = (
                    image.resize((right // 2, low // 2)),
                    image,
                    image.crop((right // 100, low // 100, right * 99 // 100, low * 99 // 100)),
                )
                for kind, other in zip(kinds, changed, strict=True):
                    for part in ("train", "val"):
                        (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
                    (tmp_path / kind / "train" / name).write_bytes(stored)
                    other.save(tmp_path / kind / "val" / name, "JPEG", quality=50)
                count += 1
    found = {}
    for kind in kinds:
        splits = found_folder(tmp_path / kind)
        leaks = scan(splits, max_pixels=64_000_000, workers=2).leaks_alike
        assert all(copy.name == copy.of for copy in leaks)
        found[kind] = len(leaks)
    assert count > 300
    assert found["halved"] == found["saved"] == count
    # The hash alone loses as many.
    assert found["cut"] > 0.85 * count


@pytest.mark.slow
def test_cifar10_has_test_images_that_look_like_training_images() -> None:
    pytest.importorskip("pyarrow")
    if not CIFAR10.is_dir():
        pytest.skip(f"no CIFAR-10 in {DATA}")
    section = ParquetData(kind="parquet", root=CIFAR10, held_out="test*.parquet")
    splits = build_data(section)
    found = scan(splits, max_pixels=10_000, workers=2)
    assert splits.held_out is not None
    assert found.held_out is not None
    assert (found.train.images, found.held_out.images) == (50_000, 10_000)
    assert (found.broken, found.leaks) == ((), ())
    # Of ten classes one in ten would fit by chance.
    assert len(found.leaks_alike) > 50
    assert all(copy.is_same_class for copy in found.leaks_alike)
    numbers = [
        {source.name(index): index for index in range(len(source))}
        for source in (splits.held_out, splits.train)
    ]
    for copy in found.leaks_alike:
        looks = [
            look_of(decode(source.read(number[name]).image, max_pixels=10_000))
            for source, number, name in (
                (splits.held_out, numbers[0], copy.name),
                (splits.train, numbers[1], copy.of),
            )
        ]
        one, other = looks
        assert one is not None
        assert other is not None
        assert (one.hash ^ other.hash).bit_count() == copy.bits <= 4
