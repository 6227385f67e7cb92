import errno

import numpy as np
import pytest

from bigsimclr.data import Sample
from bigsimclr.data.decode import UnreadableImageError
from bigsimclr.data.stored import stored_image
from bigsimclr.errors import DataError


class Failing:
    """A source of one image that cannot be read."""

    classes: tuple[str, ...] = ()
    fingerprint = "failing"
    image_size = None
    labels = np.full(1, -1, np.int64)

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Sample:
        raise self._error if index == 0 else IndexError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("told\x1b[31m"), "told\\x1b[31m"),
        (DataError("not a regular file"), "not a regular file"),
        (UnreadableImageError("empty file"), "empty file"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_whatever_is_in_the_way_is_one_error(error: Exception, reason: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        stored_image(Failing(error), 0)
    assert str(caught.value) == reason
