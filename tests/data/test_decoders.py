"""DALI and libjpeg-turbo beside Pillow: equal draws and judgements, and nearly equal pixels."""

import io
import logging
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bigsimclr.augment import ViewSettings
from bigsimclr.data.dali import DaliCrops, UndecodableError
from bigsimclr.data.decode import UnreadableImageError, decode
from bigsimclr.data.decoders import choose_decoder
from bigsimclr.data.folder import FolderSource, training_folder
from bigsimclr.data.loader import Batch, Loader, evaluation_batches, view_hash
from bigsimclr.data.steps import Means
from bigsimclr.errors import DataError, MissingExtraError, RecipeError
from tests.data.test_real_images import DATA, SHARDS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
HAS_TURBO = find_spec("simplejpeg") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="nvidia-dali is not installed")
SETTINGS = ViewSettings(image_size=64, colour_strength=1.0, colour_probability=0.8)


def smooth(seed: int, height: int = 90, width: int = 120) -> Image.Image:
    """A picture with edges and slopes, like photographs, and not like noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corpus() -> dict[str, bytes]:
    plain = [encoded(smooth(seed), quality=90) for seed in range(6)]
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16))
    return {
        **{f"plain{number}.jpg": content for number, content in enumerate(plain)},
        "progressive.jpg": encoded(smooth(10), progressive=True),
        "grey.jpg": encoded(smooth(11).convert("L")),
        "coarse colours.jpg": encoded(smooth(12), subsampling="4:2:0"),
        "fine colours.jpg": encoded(smooth(13), subsampling="4:4:4"),
        "odd size.jpg": encoded(smooth(14, 67, 101), quality=80),
        "tiny.jpg": encoded(smooth(15, 5, 3)),
        "rotated.jpg": encoded(smooth(16), exif=turned),
        "cmyk.jpg": encoded(smooth(17).convert("CMYK")),
        "stored as red green blue.jpg": encoded(smooth(18), keep_rgb=True),
        "trailing.jpg": plain[0] + b"more",
        "picture.png": encoded(smooth(19), "PNG"),
        "alpha.png": encoded(smooth(20).convert("RGBA"), "PNG"),
        "palette.png": encoded(smooth(21).quantize(16), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "picture.webp": encoded(smooth(22), "WEBP"),
    }


def damaged() -> dict[str, bytes]:
    whole = encoded(smooth(30), quality=95)
    start = whole.index(b"\xff\xda")
    wrong_table = bytearray(whole)
    wrong_table[whole.index(b"\xff\xc4") + 5] = 255
    return {
        "cut.jpg": whole[: len(whole) // 2],
        "cut and closed.jpg": whole[: len(whole) // 2] + b"\xff\xd9",
        "no scan.jpg": whole[:start] + b"\xff\xd9",
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>" * 30,
        "wrong table.jpg": bytes(wrong_table),
    }


def folder(root: Path, files: dict[str, bytes]) -> FolderSource:
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content)
    return training_folder(root, ".", labelled=False)


def read(
    source: FolderSource, first: int = 0, steps: int = 6, **options: object
) -> tuple[Batch, dict[str, str]]:
    decoder, workers = options.pop("decoder", "dali"), options.pop("workers", 0)
    loader = Loader(
        source,
        indices=np.arange(len(source)),
        labels=source.labels,
        settings=options.pop("settings", SETTINGS),
        views=2,
        seed=3,
        global_batch=8,
        unreadable_limit=0.5,
        means=Means(workers=workers, decoder=decoder),
        **options,
    )
    return Batch.join(list(loader.batches(first, steps))), loader.unreadable


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean difference in steps of 1/255, and the share of at most two steps."""
    difference = np.abs(found - expected) * 255
    return float(difference.mean()), float((difference <= 2).mean())


@needs_dali
def test_every_kind_of_image_has_the_same_draws_and_pixels(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", corpus())
    expected, _ = read(source, decoder="pillow")
    found, unreadable = read(source)
    assert not unreadable
    assert view_hash(found) == view_hash(expected)
    for row, index in enumerate(expected.indices.tolist()):
        mean, share = agreement(found.pixels[:, row].numpy(), expected.pixels[:, row].numpy())
        # Of a crop of three by five pixels the border is most.
        assert mean < 0.5, source.name(index)
        assert share > 0.9, source.name(index)
    mean, share = agreement(found.pixels.numpy(), expected.pixels.numpy())
    assert mean < 0.05
    assert share > 0.99


@needs_dali
@pytest.mark.slow
def test_one_view_hash_over_workers_ranks_and_resumption(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", corpus())
    straight, _ = read(source, steps=6)
    expected = view_hash(straight)
    assert view_hash(read(source, decoder="pillow")[0]) == expected
    for workers in (1, 2, 3):
        found, _ = read(source, workers=workers)
        assert view_hash(found) == expected
        assert torch.equal(found.pixels, straight.pixels)
    for resumed in (1, 2, 3, 4, 5):
        before, _ = read(source, steps=resumed)
        after, _ = read(source, first=8 * resumed, steps=6 - resumed, workers=resumed % 3)
        assert torch.equal(Batch.join([before, after]).pixels, straight.pixels)
        assert view_hash(Batch.join([before, after])) == expected
    for world_size in (2, 3, 4):
        ranks = [
            read(source, rank=rank, world_size=world_size)[0].split(1) for rank in range(world_size)
        ]
        shares = [
            (rank + 1) * 8 // world_size - rank * 8 // world_size for rank in range(world_size)
        ]
        pieces = [
            piece
            for step in range(6)
            for rank, share in zip(ranks, shares, strict=True)
            for piece in rank[step * share : (step + 1) * share]
        ]
        assert view_hash(Batch.join(pieces)) == expected


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_judged_and_replaced_as_by_pillow(tmp_path: Path, workers: int) -> None:
    source = folder(tmp_path / "images", corpus() | damaged())
    expected, bad = read(source, steps=8, decoder="pillow")
    found, also_bad = read(source, steps=8, workers=workers)
    assert also_bad == bad
    assert {"cut.jpg", "empty.jpg", "no scan.jpg", "page.jpg", "wrong table.jpg"} <= set(bad)
    assert view_hash(found) == view_hash(expected)
    assert agreement(found.pixels.numpy(), expected.pixels.numpy())[1] > 0.99


def flipped() -> Iterator[bytes]:
    """Images with some bytes changed, in the header or in the scan."""
    random = np.random.default_rng(0)
    for seed in range(40):
        content = bytearray(encoded(smooth(seed), quality=90, progressive=bool(seed % 2)))
        for place in random.integers(2, len(content) - 2, 1 + seed % 3):
            content[place] = random.integers(256)
        yield bytes(content)


@needs_dali
@pytest.mark.slow
def test_changed_bytes_are_judged_as_by_pillow(tmp_path: Path) -> None:
    files = {f"{number:02d}.jpg": content for number, content in enumerate(flipped())}
    source = folder(tmp_path / "images", files | corpus())
    bad = []
    for name, content in files.items():
        try:
            decode(content, max_pixels=1 << 20)
        except UnreadableImageError:
            bad.append(name)
    assert len(bad) > 3
    expected, named = read(source, steps=8, decoder="pillow")
    found, also_named = read(source, steps=8)
    assert also_named == named
    assert view_hash(found) == view_hash(expected)


@needs_dali
def test_evaluation_shows_the_same_centres(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", corpus() | damaged())
    shown = []
    for decoder in ("pillow", "dali"):
        left_out: dict[str, str] = {}
        batches = evaluation_batches(
            source,
            indices=np.arange(len(source)),
            settings=SETTINGS,
            batch_size=5,
            means=Means(decoder=decoder),
            unreadable_limit=1.0,
            unreadable=left_out,
        )
        shown.append((Batch.join(list(batches)), left_out))
    (expected, bad), (found, also_bad) = shown
    assert also_bad == bad
    assert view_hash(found) == view_hash(expected)
    assert agreement(found.pixels.numpy(), expected.pixels.numpy())[1] > 0.99


@needs_dali
def test_a_chunk_that_cannot_be_decoded_spoils_no_other() -> None:
    def crops() -> DaliCrops:
        return DaliCrops(views=1, side=16, most=4, threads=1, device=CPU)

    images = [np.frombuffer(encoded(smooth(seed)), np.uint8) for seed in range(3)]
    cut = images[0][: len(images[0]) // 2]
    boxes = np.tile(np.array([2, 3, 40, 50], np.int32), (1, 2, 1))
    alone = crops()
    alone.start(images[1:], boxes)
    expected = alone.finish()
    several = crops()
    several.start([images[0], cut], boxes)
    several.start(images[1:], boxes)
    with pytest.raises(UndecodableError):
        several.finish()
    assert torch.equal(several.finish(), expected)


@needs_dali
def test_a_device_that_fails_is_no_image_that_cannot_be_decoded() -> None:
    class Exhausted(DaliCrops):
        def _collect(self, _: torch.Tensor) -> None:
            raise RuntimeError(
                "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"
            )

    crops = Exhausted(views=1, side=16, most=4, threads=1, device=CPU)
    crops.start([np.frombuffer(encoded(smooth(0)), np.uint8)], np.array([[[0, 0, 9, 9]]], np.int32))
    with pytest.raises(DataError, match=r"input\.decoder: DALI fails.* \(2\): out of memory"):
        crops.finish()


@needs_dali
def test_an_image_that_only_pillow_reads_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder(tmp_path / "images", corpus())
    with pytest.MonkeyPatch.context() as patch:

        def refuse(self: DaliCrops, crops: torch.Tensor) -> None:
            raise RuntimeError("Unrecognized image format")

        patch.setattr(DaliCrops, "_collect", refuse)
        found, unreadable = read(source, steps=3)
    assert not unreadable
    assert torch.equal(found.pixels, read(source, steps=3, decoder="pillow")[0].pixels)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "DALI refuses images that Pillow reads, which is slower: Unrecognized image format"
    ]


@needs_dali
@pytest.mark.slow
def test_photographs_agree(tmp_path: Path) -> None:
    if not SHARDS:
        pytest.skip(f"no photographs in {DATA}")
    with tarfile.open(SHARDS[0]) as shard:
        members = [member for member in shard if member.name.endswith(".jpg")][:40]
        contents = [(member.name, shard.extractfile(member)) for member in members]
        files = {Path(name).name: file.read() for name, file in contents if file is not None}
    source = folder(tmp_path / "images", files)
    settings = ViewSettings(image_size=224)
    expected, _ = read(source, steps=5, decoder="pillow", settings=settings)
    found, _ = read(source, steps=5, settings=settings)
    assert view_hash(found) == view_hash(expected)
    mean, share = agreement(found.pixels.numpy(), expected.pixels.numpy())
    assert mean < 0.02
    assert share > 0.999


@pytest.mark.skipif(not HAS_TURBO, reason="simplejpeg is not installed")
@pytest.mark.parametrize("workers", [0, 2])
def test_turbo_is_pillow_to_the_bit(tmp_path: Path, workers: int) -> None:
    files = {f"flipped{number:02d}.jpg": content for number, content in enumerate(flipped())}
    source = folder(tmp_path / "images", corpus() | damaged() | files)
    expected, bad = read(source, steps=10, decoder="pillow")
    found, also_bad = read(source, steps=10, decoder="turbo", workers=workers)
    assert also_bad == bad
    assert len(bad) > 6
    assert view_hash(found) == view_hash(expected)
    assert torch.equal(found.pixels, expected.pixels)


def test_what_is_taken_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    best = "turbo" if HAS_TURBO else "pillow"
    assert choose_decoder("pillow", resize="tf2", device=GPU) == "pillow"
    assert choose_decoder("auto", resize="tf2", device=CPU) == best
    assert choose_decoder("auto", resize="tf1", device=GPU) == best
    assert choose_decoder("auto", resize="tf2", device=GPU) == ("dali" if HAS_DALI else best)
    said = [record.getMessage() for record in caplog.records]
    taken = "libjpeg-turbo" if HAS_TURBO else "Pillow"
    wanting = "" if HAS_TURBO else " and simplejpeg is not installed (extra turbo)"
    assert said == [
        "decoder: Pillow, as ordered",
        f"decoder: {taken}, since there is no GPU{wanting}",
        f"decoder: {taken}, since DALI has no kernel tf1{wanting}",
        "decoder: DALI, which is installed and has a GPU"
        if HAS_DALI
        else f"decoder: {taken}, since nvidia-dali is not installed (extra dali){wanting}",
    ]


def test_an_order_that_cannot_be_followed_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"DALI has no kernel augment\.resize=tf1"):
        choose_decoder("dali", resize="tf1", device=CPU)
    for choice, is_installed in (("dali", HAS_DALI), ("turbo", HAS_TURBO)):
        if is_installed:
            assert choose_decoder(choice, resize="tf2", device=CPU) == choice
        else:
            with pytest.raises(MissingExtraError, match=rf"bigsimclr\[{choice}\]"):
                choose_decoder(choice, resize="tf2", device=CPU)
