"""Images that are all the same size and held in memory: NumPy files and the bundled digits."""

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from bigsimclr.data import Sample
from bigsimclr.data.names import fingerprint, printable, some
from bigsimclr.data.places import require_file
from bigsimclr.errors import DataError

DIGITS = 1797  # images that scikit-learn carries; known without loading it

_KEY: Final = "data.root"
# What reading a broken archive raises: RuntimeError where it is encrypted or compressed unusually.
_DAMAGE: Final = (
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


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
    has_labels = _checked(path).has_labels
    images = _array(path, "images")
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    # Any negative number says "no label".
    labels = np.maximum(_array(path, "labels").astype(np.int64), -1) if has_labels else None
    top = -1 if labels is None else int(labels.max())
    return ArraySource(
        np.ascontiguousarray(images, np.uint8),
        labels,
        classes=tuple(str(number) for number in range(top + 1)),
        prefix=path.stem,
    )


def count_arrays(path: Path) -> int:
    """Count the images of a .npz file from its headers alone.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    return _checked(path).images


@dataclass(frozen=True)
class _Contents:
    images: int
    has_labels: bool


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @override
    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _checked(path: Path) -> _Contents:
    """Check the file's headers; no array is read."""
    require_file(
        path,
        _KEY,
        hint="data.kind=folder reads folders of images",
        missing_hint="give the .npz file with data.root=FILE",
    )
    shown = f"{_KEY}: {printable(str(path))}"
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
    except OSError as error:
        raise _out_of_reach(path, error) from error
    except _DAMAGE as error:
        raise DataError(
            f"{shown} is not a .npz file; write one with numpy.savez(FILE, images=..., labels=...)"
        ) from error
    if "images" not in held:
        raise DataError(
            f"{shown} has no array `images`; it holds {some(held) if held else 'nothing'}"
        )
    images = _header(path, "images")
    is_grey = len(images.shape) == 3
    is_colour = len(images.shape) == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (is_grey or is_colour) or 0 in images.shape:
        raise DataError(
            f"{shown}: `images` is {images};"
            " it must be uint8 [N,H,W,3] or [N,H,W] with at least one image"
        )
    count = images.shape[0]
    if "labels" not in held:
        return _Contents(count, has_labels=False)
    labels = _header(path, "labels")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{shown}: `labels` is {labels}; it must be whole numbers [{count}], one for each image"
        )
    return _Contents(count, has_labels=True)


def _header(path: Path, name: str) -> _Header:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(member)
            size, start = archive.getinfo(f"{name}.npy").file_size, member.tell()
    except OSError as error:
        raise _out_of_reach(path, error) from error
    except _DAMAGE as error:
        raise _damaged(path, name) from error
    if dtype.hasobject:
        raise DataError(
            f"{_KEY}: {printable(str(path))}: `{name}` holds pickled Python objects; they are never"
            " read, as reading them could run code. Save plain numbers"
        )
    # A header that promises more than the file holds would have memory set aside for nothing.
    if size - start != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, name)
    return _Header(shape, dtype)


def _array(path: Path, name: str) -> NDArray[np.generic]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            array: NDArray[np.generic] = np.lib.format.read_array(member, allow_pickle=False)
            return array
    except OSError as error:
        raise _out_of_reach(path, error) from error
    except _DAMAGE as error:
        raise _damaged(path, name) from error


def _damaged(path: Path, name: str) -> DataError:
    return DataError(
        f"{_KEY}: {printable(str(path))} is damaged: `{name}` cannot be read;"
        " write the file again with numpy.savez"
    )


def _out_of_reach(path: Path, error: OSError) -> DataError:
    return DataError(f"{_KEY}: {printable(str(path))}: {error.strerror or 'cannot be read'}")
