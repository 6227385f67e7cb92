import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Encode = Callable[[NDArray[np.uint8]], bytes]


@pytest.fixture
def png() -> Encode:
    """Encode uint8 [h,w,3] as PNG."""

    def encode(pixels: NDArray[np.uint8]) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    return encode


@pytest.fixture
def pictures() -> NDArray[np.uint8]:
    """Twelve images of noise, uint8 [12,9,11,3]."""
    return np.random.default_rng(0).integers(0, 256, (12, 9, 11, 3), dtype=np.uint8)


@pytest.fixture
def class_folder(tmp_path: Path, png: Encode, pictures: NDArray[np.uint8]) -> Path:
    """Three classes of four images each."""
    for number, pixels in enumerate(pictures):
        path = tmp_path / "set" / f"class_{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return tmp_path / "set"
