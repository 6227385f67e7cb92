"""Where the stored values of the official code lie."""

import os
from pathlib import Path

import pytest


def golden_dir() -> Path:
    """Return the folder of golden values; skip the calling test module where there is none.

    The environment variable BIGSIMCLR_GOLDEN names it; the default is `../shared/golden` beside
    the repository.
    """
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
    directory = Path(os.environ.get("BIGSIMCLR_GOLDEN", default)).resolve()
    if not directory.is_dir():
        pytest.skip(
            f"no golden values in {directory}; set BIGSIMCLR_GOLDEN", allow_module_level=True
        )
    return directory
