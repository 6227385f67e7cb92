"""benchmarks.input on a CPU: shards and folders, every decoder that is here, and our step."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import input as benchmark
from benchmarks.decode import agreement, decoder_of, is_installed
from benchmarks.loader import files_in, generate
from bigsimclr.data.decode import decode
from bigsimclr.data.folder import training_folder
from bigsimclr.data.pack import pack


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "images"
    generate(folder, 6)
    return folder


def reference(encoded: bytes) -> np.ndarray:
    return decode(encoded, max_pixels=10**7)


def test_shards_and_folders_are_opened(images: Path, tmp_path: Path) -> None:
    pack(training_folder(images, ".", labelled=False), tmp_path)
    of_files, of_shards = benchmark.opened(images), benchmark.opened(tmp_path)
    assert len(of_files) == 6
    for row in range(6):
        assert of_files.read(row).image == of_shards.read(row).image


@pytest.mark.slow
def test_all_parts_are_measured_and_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "input.json"
    words = ["--data", str(images), "--workers", "1", "--batch", "4", "--steps", "1"]
    words += ["--rounds", "2", "--network", "r10-0.0625x-cifar", "--network-batch", "2"]
    monkeypatch.setattr(benchmark, "installed", lambda: ["pillow"])
    monkeypatch.setattr(benchmark.nvimagecodec, "is_installed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["input", *words, "-o", str(output)])
    benchmark.main()
    result = json.loads(output.read_text())
    assert set(result["left_out"]) == {"turbo", "dali", "nvimagecodec"}
    assert result["agreement"] == []
    (rate,) = result["rates"]
    assert (rate["decoder"], rate["workers"], rate["over_pillow"]) == ("pillow", 1, 1.0)
    (trained,) = result["training"]
    assert 0 < trained["least"] <= trained["speed_with_over_without"]
    assert result["settings"]["images"] == 6


def test_a_decoder_that_fails_is_named(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark.batches_of

    def failing(source, means, batch, **steps):
        if means.decoder == "dali":
            raise OSError("libnvjpeg.so:\n not found")
        return real(source, means, batch, **steps)

    monkeypatch.setattr(benchmark, "installed", lambda: ["pillow", "dali"])
    monkeypatch.setattr(benchmark, "batches_of", failing)
    found, left_out = benchmark.usable(benchmark.opened(images), benchmark.ALONE)
    assert found == ["pillow"]
    assert left_out["dali"] == "it fails: libnvjpeg.so: not found"
    assert "turbo" in left_out


def test_whole_images_are_compared_pixel_by_pixel(images: Path) -> None:
    files = [file.read_bytes() for file in files_in(images)]

    class Decoded:
        def __init__(self, pixels: np.ndarray) -> None:
            self._pixels = pixels

        def cpu(self) -> np.ndarray:
            return self._pixels

    def other(some):
        pixels = [reference(file).copy() for file in some]
        pixels[0][0, 0] = 255 - pixels[0][0, 0]
        return [Decoded(found) for found in pixels[:-1]] + [None]

    found = agreement(other, files, reference)
    size = 5 * reference(files[0]).size
    assert found["images_decoded"] == 5
    apart = np.abs(255 - 2 * reference(files[0])[0, 0].astype(int))
    assert found["most_steps"] == apart.max() > 2
    assert found["mean_steps"] == pytest.approx(apart.sum() / size, abs=1e-5)
    assert found["share_within_two_steps"] == pytest.approx(1 - (apart > 2).sum() / size, abs=1e-6)
    assert agreement(lambda some: [None] * len(some), files, reference) == {"images_decoded": 0}


@pytest.mark.skipif(not is_installed(), reason="nvidia-nvimgcodec is not installed")
def test_nvimagecodec_decodes_as_pillow(images: Path) -> None:
    files = [file.read_bytes() for file in files_in(images)]
    found = agreement(decoder_of("cpu", 1), files, reference)
    assert found == {
        "images_decoded": 6,
        "mean_steps": 0.0,
        "share_within_two_steps": 1.0,
        "most_steps": 0,
    }
