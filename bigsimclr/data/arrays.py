"""Images that are all the same size and held in memory: NumPy files and the bundled digits."""

import zipfile
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Sample
from bigsimclr.data.names import fingerprint, printable
from bigsimclr.errors import DataError

DIGITS = 1797  # images that scikit-learn carries; known without loading it


class ArraySource:
    """Hold equal images as one array, so that a batch is one gather."""

    def __init__(
        self,
        images: NDArray[np.uint8],  # [N, H, W, 3]
        labels: NDArray[np.int64] | None = None,  # [N], -1 where there is none
        *,
        classes: tuple[str, ...] = (),
        prefix: str = "image",  # names are `prefix-000042`, numbered before any split
        numbers: NDArray[np.int64] | None = None,  # [N] those numbers; None counts from 0
    ) -> None:
        count = len(images)
        self.images = images
        self.labels = np.full(count, -1, np.int64) if labels is None else labels
        self.classes = classes
        self.image_size: tuple[int, int] | None = (images.shape[1], images.shape[2])
        self.prefix = prefix
        self.numbers = np.arange(count, dtype=np.int64) if numbers is None else numbers
        self.fingerprint = fingerprint(
            [
                repr((images.shape, classes, prefix)).encode(),
                np.ascontiguousarray(self.numbers).tobytes(),
                np.ascontiguousarray(self.labels).tobytes(),
                np.ascontiguousarray(images).tobytes(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Name image `index` by its number in the whole file."""
        return f"{self.prefix}-{int(self.numbers[index]):06d}"

    def read(self, index: int) -> Sample:
        """Return image `index`."""
        return Sample(image=self.images[index], label=int(self.labels[index]), index=index)

    def read_many(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images of `indices` as one array [B, H, W, 3]."""
        return self.images[indices]

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return a source of `rows` alone; names stay."""
        return type(self)(
            self.images[rows],
            self.labels[rows],
            classes=self.classes,
            prefix=self.prefix,
            numbers=self.numbers[rows],
        )


def digits() -> ArraySource:
    """Load the 1,797 scanned digits of scikit-learn as uint8 [1797, 8, 8, 3].

    The scans hold 0 to 16; they are spread over 0 to 255 and repeated in three equal channels.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    grey = np.rint(bundle.images * (255.0 / 16.0)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    return ArraySource(
        images,
        bundle.target.astype(np.int64),
        classes=tuple(str(name) for name in bundle.target_names),
        prefix="digit",
    )


def load_arrays(path: Path) -> ArraySource:
    """Read a .npz file with `images` (uint8 [N,H,W,3] or [N,H,W]) and perhaps `labels` [N].

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    shown = printable(str(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile) or "images" not in archive:
                raise DataError(f"{shown} must be a .npz file with an array `images`")
            images = archive["images"]
            labels = archive.get("labels")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{shown} cannot be read as a .npz file: {error}") from error
    _check_images(images.shape, images.dtype, shown)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    checked = _checked_labels(labels, len(images), shown)
    top = -1 if checked is None else int(checked.max())
    return ArraySource(
        np.ascontiguousarray(images),
        checked,
        classes=tuple(str(number) for number in range(top + 1)),
        prefix=path.stem,
    )


def count_arrays(path: Path) -> int:
    """Count the images of a .npz file from its header alone.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    shown = printable(str(path))
    try:
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(member)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{shown} cannot be read as a .npz file with an array `images`: {error}"
        ) from error
    _check_images(shape, dtype, shown)
    return int(shape[0])


def _check_images(shape: tuple[int, ...], dtype: np.dtype[np.generic], shown: str) -> None:
    is_grey, is_colour = len(shape) == 3, len(shape) == 4 and shape[3] == 3
    if dtype != np.uint8 or not (is_grey or is_colour) or 0 in shape:
        raise DataError(
            f"{shown}: `images` is {dtype} {list(shape)};"
            " it must be uint8 [N,H,W,3] or [N,H,W] with at least one image"
        )


def _checked_labels(
    labels: NDArray[np.generic] | None, count: int, shown: str
) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{shown}: `labels` is {labels.dtype} {list(labels.shape)};"
            f" it must be whole numbers [{count}], one for each image"
        )
    # Any negative number says "no label".
    return np.maximum(labels.astype(np.int64), -1)
