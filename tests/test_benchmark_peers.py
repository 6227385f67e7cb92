"""Other libraries in benchmarks: what cannot be imported is left out, and nothing else is lost."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.augment import draw, methods
from benchmarks.peers import has_lightly, imported

needs_lightly = pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages; what is imported from it is forgotten afterwards."""
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    imported.cache_clear()
    yield tmp_path
    imported.cache_clear()
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_a_library_without_what_it_needs_is_left_out(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / "kornia").mkdir()
    (packages / "kornia" / "__init__.py").write_text("import kornia_rs_that_is_not_there")
    (packages / "kornia" / "augmentation.py").write_text("")
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    found = methods(pixels, draw(2, 32))
    assert {"plain", "per image", "batched"} <= found.keys()
    assert "kornia" not in found
    assert imported("kornia.augmentation") is None
    (line,) = capsys.readouterr().err.splitlines()
    said = "kornia.augmentation is left out: No module named 'kornia_rs_that_is_not_there'"
    assert line == said


def test_a_library_that_is_there_is_taken(packages: Path) -> None:
    (packages / "bigsimclr_peer.py").write_text("VALUE = 7")
    module = imported("bigsimclr_peer")
    assert module is not None
    assert module.VALUE == 7


@needs_lightly
def test_lightly_can_be_asked_for_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert has_lightly()
    for name in ("lightly", "lightly.loss", "lightly.models.utils"):
        specification = find_spec(name)
        assert specification is not None
        assert specification.origin is not None
        assert name.rpartition(".")[2] in specification.origin
    assert "torchvision" not in sys.modules
    assert not capsys.readouterr().err
