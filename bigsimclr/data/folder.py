"""Images in a folder: one sub-folder per class, or no labels at all."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Sample, Splits
from bigsimclr.data.listing import (
    SUFFIXES,
    Listing,
    first_level,
    is_folder,
    walk,
    walk_folder,
    warn_of_left_out,
)
from bigsimclr.data.manifest import listed_images
from bigsimclr.data.names import NameTable, counted, fingerprint, printable, some
from bigsimclr.data.places import named, patiently, require_folder
from bigsimclr.errors import DataError

logger = logging.getLogger(__name__)

# Far beyond any image, and far below what the memory of a worker should be asked for.
_MOST_BYTES: Final = 1 << 30

# Names by which folders of training and of held-out images go.
_TRAINING_NAMES: Final = ("train", "training")
HELD_OUT_NAMES: Final = ("held_out", "val", "valid", "validation", "test")


class FolderSource:
    """Read image files by index; build one with `training_folder` or `held_out_folder`."""

    def __init__(
        self,
        root: Path,
        names: NameTable,  # paths of the N images below `root`, with forward slashes
        *,
        sizes: NDArray[np.int64],  # [N] bytes
        labels: NDArray[np.int64],  # [N], -1 where there is none
        classes: tuple[str, ...],
        left_out: Mapping[str, str] | None = None,  # name -> reason, of what only looks like one
        skipped: Mapping[str, int] | None = None,  # suffix -> files, of what does not
    ) -> None:
        self.root = root
        self.left_out: Mapping[str, str] = {} if left_out is None else left_out
        self.skipped: Mapping[str, int] = {} if skipped is None else skipped
        self.labels = labels
        self.classes = classes
        self.image_size: tuple[int, int] | None = None
        self.fingerprint = fingerprint(
            [names.content, sizes.tobytes(), labels.tobytes(), *map(os.fsencode, classes)]
        )
        self._names = names
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._names)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all files together."""
        return int(self._sizes.sum())

    def name(self, index: int) -> str:
        """Return the path of image `index` below the folder."""
        return self._names[index]

    def read(self, index: int) -> Sample:
        """Return the file of image `index`, still encoded.

        Raises:
            OSError: the file cannot be read.
            DataError: it is no longer a regular file, or no longer of the size it had.
        """
        content = read_regular(self.root / self._names[index])
        if len(content) != self._sizes[index]:
            before = int(self._sizes[index])
            raise DataError(f"has {len(content):,} bytes, and had {before:,} when it was listed")
        return Sample(image=content, label=int(self.labels[index]), index=index)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return a source of `rows` alone; names stay."""
        return type(self)(
            self.root,
            self._names.take(rows),
            sizes=self._sizes[rows],
            labels=self.labels[rows],
            classes=self.classes,
            left_out=self.left_out,
            skipped=self.skipped,
        )


def training_folder(
    root: Path,
    folder: str,
    *,
    labelled: bool,
    root_key: str = "data.root",
    manifest: Path | None = None,
) -> FolderSource:
    """Open the training images below `root`/`folder`.

    Args:
        root: the data set's folder.
        folder: the training images' folder, relative to `root`.
        labelled: the first sub-folder names the class. Without sub-folders there are no labels.
        root_key: the recipe's key that messages name for `root`; "" when it is not a recipe's.
        manifest: a list of the images below `root`, instead of walking through it.

    Raises:
        DataError: there are no images, some lie beside the class folders, or a class has none.
    """
    path, key = _place(root, folder, root_key=root_key, key="data.train")
    found = _listing(root, folder, path, key, manifest)
    classes = _class_names(found, path, key) if labelled else []
    return _source(path, found, tuple(classes), _labels(found.names, classes, path, key))


def single_image(path: Path) -> FolderSource:
    """Open one image file, whatever its name ends in.

    Raises:
        OSError: it cannot be reached.
    """
    sizes = np.array([path.stat().st_size], np.int64)
    unknown = np.array([-1], np.int64)
    return FolderSource(
        path.parent, NameTable([path.name]), sizes=sizes, labels=unknown, classes=()
    )


def held_out_folder(
    training: FolderSource, root: Path, folder: str, *, manifest: Path | None = None
) -> FolderSource:
    """Open the held-out images below `root`/`folder`, with the classes of the training images.

    Raises:
        DataError: there are no images, a class is not among the training images, or the two
            folders overlap.
    """
    path, key = _place(root, folder, root_key="data.root", key="data.held_out")
    inner, outer = path.resolve(), training.root.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise DataError(
            f"{key}: the held-out folder {printable(str(path))} and the training folder"
            f" {printable(str(training.root))} overlap: set data.train to a folder of its own"
        )
    found = _listing(root, folder, path, key, manifest)
    labels = _labels(found.names, list(training.classes), path, key)
    return _source(path, found, training.classes, labels)


def found_folder(root: Path) -> Splits:
    """Open all images below a folder as they lie there, to look at them; no recipe is meant.

    Where it holds `train` beside `val`, `test` or others of such names, in whatever case, these are
    the training and the held-out images; what else lies there is named in the log. Sub-folders are
    classes where no image lies beside them; classes may be empty. Held-out images without
    sub-folders have no class.

    Raises:
        DataError: there are no images, or a folder cannot be read.
    """
    require_folder(root, "")
    level = first_level(root)
    inner = {entry.name: entry.name.lower() for entry in level if is_folder(entry)}
    train = next((name for name, known in inner.items() if known in _TRAINING_NAMES), None)
    apart = [name for known in HELD_OUT_NAMES for name in inner if inner[name] == known]
    if train is None or not apart:
        whole = walk_folder(root, "")
        classes = tuple(sorted(_class_folders(whole), key=os.fsencode))
        return Splits(_found_source(root, whole, classes), None)
    found = {name: walk(root / name) for name in apart}
    if not any(part.names for part in found.values()):
        walk_folder(root / apart[0], "")
    held_out = {name: part for name, part in found.items() if part.names}
    loose = [entry.name for entry in level if PurePath(entry.name).suffix.lower() in SUFFIXES]
    unread = [*(name for name in inner if name != train and name not in held_out), *loose]
    if unread:
        logger.warning("%s: not read, beside %s: %s", printable(str(root)), train, some(unread))
    training = walk_folder(root / train, "")
    names = _class_folders(training)
    if names:
        names = names.union(*(_class_folders(part) for part in held_out.values()))
    classes = tuple(sorted(names, key=os.fsencode))
    source = _found_source(root / train, training, classes)
    return Splits(source, *_held_out(root, held_out, classes))


def _held_out(
    root: Path, parts: Mapping[str, Listing], classes: tuple[str, ...]
) -> tuple[FolderSource, str]:
    """Open held-out folders as one source, and say what they are called together."""
    if len(parts) == 1:
        ((name, only),) = parts.items()
        return _found_source(root / name, only, classes), f"the folder {name}"
    labels = [_found_labels(part, classes, root / name) for name, part in parts.items()]
    source = _source(root, _together(parts), classes, np.concatenate(labels))
    return source, f"the folders {' and '.join(parts)}"


def _class_folders(found: Listing) -> set[str]:
    return set(found.inner) if all("/" in name for name in found.names) else set()


def _found_labels(found: Listing, classes: tuple[str, ...], path: Path) -> NDArray[np.int64]:
    return _labels(found.names, list(classes) if _class_folders(found) else [], path, "")


def _found_source(path: Path, found: Listing, classes: tuple[str, ...]) -> FolderSource:
    return _source(path, found, classes, _found_labels(found, classes, path))


def _together(parts: Mapping[str, Listing]) -> Listing:
    """Make one listing of several folders beside each other."""
    skipped: Counter[str] = Counter()
    for part in parts.values():
        skipped.update(part.skipped)
    return Listing(
        [f"{folder}/{name}" for folder, part in parts.items() for name in part.names],
        np.concatenate([part.sizes for part in parts.values()]),
        {
            f"{folder}/{name}": at
            for folder, part in parts.items()
            for name, at in part.folders.items()
        },
        {
            f"{folder}/{name}": why
            for folder, part in parts.items()
            for name, why in part.left_out.items()
        },
        skipped,
    )


def count_folder(
    root: Path,
    folder: str,
    *,
    labelled: bool,
    key: str = "data.train",
    manifest: Path | None = None,
) -> int:
    """Count the images below `root`/`folder` without opening any.

    Raises:
        DataError: there are none; where they are labelled, also as in `training_folder`.
    """
    path, key = _place(root, folder, root_key="data.root", key=key)
    found = _listing(root, folder, path, key, manifest)
    if labelled:
        _class_names(found, path, key)
    return len(found.names)


def read_regular(path: Path) -> bytes:
    """Read a regular file whole; never wait for a pipe or a device that took its place.

    Raises:
        OSError: it cannot be read, after two more tries where the error may pass.
        DataError: it is not a regular file, or far bigger than an image.
    """
    return patiently(lambda: _read_once(path))


def _read_once(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file")
        if status.st_size > _MOST_BYTES:
            raise DataError(f"holds {status.st_size} bytes (limit {_MOST_BYTES})")
        return file.read()


def _place(root: Path, folder: str, *, root_key: str, key: str) -> tuple[Path, str]:
    """Return the folder of some images and the recipe's key that names it."""
    hint = f"give the folder of the images with {root_key}=DIR" if root_key else ""
    require_folder(root, root_key, hint=hint, missing_hint=hint)
    path = root / folder
    if path == root:
        return path, root_key
    inner = sorted(entry.name for entry in os.scandir(root) if is_folder(entry))
    require_folder(
        path, key, missing_hint=f"{printable(str(root))} holds {some(inner)}" if inner else ""
    )
    return path, key


def _listing(root: Path, folder: str, path: Path, key: str, manifest: Path | None) -> Listing:
    if manifest is None:
        found = walk_folder(path, key)
        warn_of_left_out(found, path)
        return found
    return listed_images(manifest, root, folder, key="data.manifest")


def _class_names(found: Listing, path: Path, key: str) -> list[str]:
    """Take the first sub-folders as classes; a folder without sub-folders has none."""
    place = f"{named(key)}{printable(str(path))}"
    beside = [name for name in found.names if "/" not in name]
    if len(beside) == len(found.names):
        return []
    if beside:
        several = len(beside) > 1
        raise DataError(
            f"{place}: {counted(len(beside), 'image')} {'lie' if several else 'lies'} beside the"
            f" class folders: {some(beside)}; move {'them' if several else 'it'} into a"
            " class folder, or set data.labelled=false"
        )
    classes = {name.split("/", 1)[0] for name in found.names}
    empty = sorted(set(found.inner) - classes, key=os.fsencode)
    if empty:
        raise DataError(
            f"{place}: {counted(len(empty), 'class folder')} without an image of"
            f" {'their' if len(empty) > 1 else 'its'} own: {some(empty)}; put images there, or"
            f" remove {'them' if len(empty) > 1 else 'it'}"
        )
    return sorted(classes, key=os.fsencode)


def _labels(names: list[str], classes: list[str], path: Path, key: str) -> NDArray[np.int64]:
    if not classes:
        return np.full(len(names), -1, np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    unknown = sorted(set(folders) - set(numbers))
    if unknown:
        raise DataError(
            f"{named(key)}{printable(str(path))} has images of"
            f" {counted(len(unknown), 'class', 'classes')} without training images:"
            f" {some([folder or '(no class folder)' for folder in unknown])}"
        )
    return np.array([numbers[folder] for folder in folders], np.int64)


def _source(
    path: Path, found: Listing, classes: tuple[str, ...], labels: NDArray[np.int64]
) -> FolderSource:
    return FolderSource(
        path,
        NameTable(found.names),
        sizes=found.sizes,
        labels=labels,
        classes=classes,
        left_out=found.left_out,
        skipped=found.skipped,
    )
