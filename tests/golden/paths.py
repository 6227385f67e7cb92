"""Where the stored values of the official code lie."""

import os
from pathlib import Path

import pytest


def golden_dir() -> Path:
    """Return the folder of golden values; skip the calling test module where there is none.

    The environment variable BIGSIMCLR_GOLDEN names it; the default is `shared/golden` in the
    repository or, where that is not, beside it.
    """
    root = Path(__file__).resolve().parents[2]
    places = [folder / "shared" / "golden" for folder in (root, root.parent)]
    default = next((place for place in places if place.is_dir()), places[-1])
    directory = Path(os.environ.get("BIGSIMCLR_GOLDEN", default)).resolve()
    if not directory.is_dir():
        pytest.skip(
            f"no golden values in {directory}; set BIGSIMCLR_GOLDEN", allow_module_level=True
        )
    return directory
