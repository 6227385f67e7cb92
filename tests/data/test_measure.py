import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bigsimclr.cli import app
from bigsimclr.data import Splits
from bigsimclr.data.arrays import ArraySource
from bigsimclr.data.folder import training_folder
from bigsimclr.data.measure import Statistics, measure
from bigsimclr.data.scan import Spread
from bigsimclr.errors import DataError
from tests.data.conftest import Encode

LIMIT = 1_000_000


@pytest.fixture
def uneven(tmp_path: Path, png: Encode) -> tuple[Splits, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 40 * (number % 6) + 56, (20 + number, 70 - number, 3), dtype=np.uint8)
        for number in range(50)
    ]
    for number, pixels in enumerate(images):
        path = tmp_path / f"{'ab'[number % 2]}/{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(pixels))
    (tmp_path / "b/broken.png").write_bytes(b"no image")
    return Splits(training_folder(tmp_path, ".", labelled=True), None), images


def timeless(found: Statistics) -> Statistics:
    return replace(found, decode_seconds=0, read_seconds=0)


def test_colours_are_those_of_all_pixels_in_float64(
    uneven: tuple[Splits, list[np.ndarray]],
) -> None:
    splits, images = uneven
    found = measure(splits, max_pixels=LIMIT)
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    assert np.allclose(found.mean, pixels.mean(axis=0), rtol=1e-11, atol=0)
    assert np.allclose(found.deviation, pixels.std(axis=0), rtol=1e-11, atol=0)
    assert (found.images, found.measured, found.unreadable) == (51, 50, 1)
    assert (found.width, found.height) == (Spread(21, 45.5, 70), Spread(20, 44.5, 69))
    assert found.classes == {"a": 25, "b": 26}
    assert found.bytes == sum(len(splits.train.read(index).image) for index in range(50))
    assert found.fingerprint == splits.train.fingerprint
    assert found.decoded_per_core_second is not None
    assert found.decoded_per_core_second == 50 / found.decode_seconds > 0


def test_the_number_of_processes_changes_nothing(
    uneven: tuple[Splits, list[np.ndarray]],
) -> None:
    splits, _ = uneven
    straight = timeless(measure(splits, max_pixels=LIMIT))
    for workers in (1, 2):
        assert timeless(measure(splits, max_pixels=LIMIT, workers=workers)) == straight


def test_a_sample_is_taken_at_equal_distances(uneven: tuple[Splits, list[np.ndarray]]) -> None:
    splits, images = uneven
    found = measure(splits, max_pixels=LIMIT, sample=3)
    # The 51 files: 25 of class a, 25 of class b, and the broken one, which is left out.
    chosen = np.concatenate([images[number].reshape(-1, 3) for number in (0, 1)]) / 255
    assert (found.measured, found.unreadable) == (2, 1)
    assert np.allclose(found.mean, chosen.mean(axis=0))
    assert measure(splits, max_pixels=LIMIT, sample=1000).measured == 50


def test_arrays_are_measured_and_not_decoded() -> None:
    pixels = np.zeros((4, 2, 2, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[0, 0, 0, 0] = 255
    found = measure(Splits(ArraySource(pixels), ArraySource(pixels[:1])), max_pixels=LIMIT)
    assert found.mean == (1 / 16, 0.0, 1.0)
    assert found.deviation == (15**0.5 / 16, 0.0, 0.0)
    assert found.decoded_per_core_second is None
    assert found.held_out == 1
    assert found.held_out_fingerprint != found.fingerprint


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    splits = Splits(training_folder(tmp_path, ".", labelled=False), None)
    with pytest.raises(DataError, match="none of 1 images can be read"):
        measure(splits, max_pixels=LIMIT)


def test_the_command_says_what_was_measured(uneven: tuple[Splits, list[np.ndarray]]) -> None:
    splits, _ = uneven
    root = str(getattr(splits.train, "root"))  # noqa: B009 - a folder's alone
    result = CliRunner().invoke(app, ["data", "stats", root, "--json", "--workers", "1"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["measured"] == 50
    assert facts["decoded_per_core_second"] > 0
    assert len(facts["mean"]) == 3
    lines = CliRunner().invoke(app, ["data", "stats", root]).stdout.splitlines()
    assert lines[0] == "images      51 for training, none held out"
    assert "            1 cannot be read" in lines
    assert any(line.startswith("decoding    ") and "50 images in" in line for line in lines)


def test_torch_is_not_needed(uneven: tuple[Splits, list[np.ndarray]]) -> None:
    splits, _ = uneven
    code = (
        "import sys\n"
        "from bigsimclr.cli import app\n"
        f"sys.argv[1:] = ['data', 'stats', {str(getattr(splits.train, 'root'))!r}]\n"  # noqa: B009
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'sklearn', 'matplotlib', 'pyarrow'} & sys.modules.keys()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
