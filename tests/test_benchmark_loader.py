"""What benchmarks.loader compares: the usual pipeline by its definition, and equal streams."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loader import (
    SIDE,
    Way,
    by_ours,
    by_torch,
    files_in,
    generate,
    measure,
    random_crop,
    sources,
    tensor_of,
)
from bigsimclr.data.steps import Means


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "images"
    generate(folder, 6)
    return folder


def test_a_tensor_has_the_pixels_of_its_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    found = tensor_of(Image.fromarray(pixels))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def test_a_random_crop_of_one_colour_is_that_colour() -> None:
    image = random_crop(Image.new("RGB", (90, 40), (10, 20, 30)))
    assert image.size == (SIDE, SIDE)
    assert image.getcolors() == [(SIDE * SIDE, (10, 20, 30))]
    # Too narrow for any aspect: the official fallback is the middle.
    assert random_crop(Image.new("RGB", (200, 2))).size == (SIDE, SIDE)


def test_all_sources_have_the_same_images(images: Path, tmp_path: Path) -> None:
    opened = sources(images, tmp_path)
    assert len(files_in(images)) == 6
    contents = [[source.read(row).image for row in range(6)] for source in opened.values()]
    assert all(content == contents[0] for content in contents)


def test_every_way_yields_what_was_asked_for(images: Path, tmp_path: Path) -> None:
    source = sources(images, tmp_path)["folder"]
    assert list(by_torch(files_in(images), 0, 3, 9)) == [3, 3, 3]
    assert list(by_ours(source, Means(), 3, 9)) == [3, 3, 3]


def test_ratios_are_over_the_way_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    def read(count: int):
        yield count

    ways = [Way(name, "folder", 1, read) for name in ("torch + PIL", "pillow")]
    theirs, ours = measure(ways, count=50, rounds=3)
    assert theirs["over_torch_and_pil"] == 1.0
    assert ours["images_per_second"] > 0
    assert "pillow" in capsys.readouterr().out
