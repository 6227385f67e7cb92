"""An image as its source stores it, with one error for whatever is in the way."""

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Source
from bigsimclr.data.decode import UnreadableImageError
from bigsimclr.data.names import printable
from bigsimclr.errors import BigSimCLRError, StorageError


def stored_image(source: Source, index: int) -> bytes | NDArray[np.uint8]:
    """Read an image as it is stored: a file's content, or pixels [h, w, 3].

    Raises:
        UnreadableImageError: it cannot be read.
        StorageError: nor could others be.
    """
    try:
        return source.read(index).image
    except (UnreadableImageError, StorageError):
        raise
    except (OSError, BigSimCLRError, MemoryError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImageError(printable(text or type(error).__name__)) from error
