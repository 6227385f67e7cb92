"""Tar shards in the WebDataset layout, read at random by offset."""

import errno
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from bigsimclr.data import Sample
from bigsimclr.data.names import NameTable, counted, fingerprint, printable, some
from bigsimclr.data.order import Runs
from bigsimclr.data.pack_file import check_complete
from bigsimclr.data.places import matching_files, patiently
from bigsimclr.data.shard_index import ShardIndex, index_shard, read_image
from bigsimclr.data.tar_members import open_regular
from bigsimclr.errors import DataError, StorageError

if TYPE_CHECKING:
    from bigsimclr.data.remote import RemoteShards

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

FILES: Final = "tar shards"
_OPEN_SHARDS: Final = 128  # descriptors that a process keeps
_AHEAD_BYTES: Final = 128 << 10
_INDEXED_AT_ONCE: Final = 8  # shards; on network disks the time goes into waiting


@dataclass(frozen=True)
class _Places:
    """Where images lie."""

    shards: Integers  # [N] number of the shard
    offsets: Integers  # [N] of the content in bytes
    sizes: Integers  # [N] bytes
    headers: Integers  # [N] CRC-32 of the block before the content

    def take(self, rows: Integers) -> "_Places":
        return _Places(self.shards[rows], self.offsets[rows], self.sizes[rows], self.headers[rows])


class ShardSource:
    """Read images from tar shards by index; open one with `open_shards`."""

    def __init__(
        self,
        paths: Sequence[Path],
        names: NameTable,  # of the N images
        *,
        places: _Places,
        labels: Integers,  # [N], -1 where there is none
        classes: tuple[str, ...],
        window: int | None = None,  # shards read at a time; None: all, each image at random
        fetch: Callable[[int], None] | None = None,  # copies a shard that is not there yet
    ) -> None:
        self.labels = labels
        self.classes = classes
        self.image_size: tuple[int, int] | None = None
        # Where images lie does not count, for shards may be cut anew or become files of a folder;
        # unless it decides on their order.
        cut = [] if window is None else [places.shards.tobytes(), str(window).encode()]
        parts = [names.content, places.sizes.tobytes(), labels.tobytes()]
        self.fingerprint = fingerprint([*parts, *map(os.fsencode, classes), *cut])
        self.arrangement = None if window is None else Runs(places.shards, window)
        self._files = _OpenFiles(paths, window=window, fetch=fetch)
        self.paths = paths
        self._fetch = fetch
        self._names = names
        self._places = places
        self._window = window

    def __len__(self) -> int:
        return len(self._names)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all images together."""
        return int(self._places.sizes.sum())

    def name(self, index: int) -> str:
        """Return the stored name of image `index`; its member's where names are not unique."""
        return self._names[index]

    def read(self, index: int) -> Sample:
        """Return image `index`, still encoded.

        Raises:
            OSError: the shard cannot be read.
            DataError: the shard was changed since it was indexed.
        """
        places = self._places
        content = self._files.read(
            int(places.shards[index]),
            offset=int(places.offsets[index]),
            size=int(places.sizes[index]),
            header=int(places.headers[index]),
        )
        return Sample(image=content, label=int(self.labels[index]), index=index)

    def take(self, rows: Integers) -> Self:
        """Return a source of `rows` alone; names stay."""
        return type(self)(
            self.paths,
            self._names.take(rows),
            places=self._places.take(rows),
            labels=self.labels[rows],
            classes=self.classes,
            window=self._window,
            fetch=self._fetch,
        )


def open_shards(
    root: Path,
    pattern: str,
    *,
    classes: tuple[str, ...] | None = None,
    key: str = "data.train",
    window: int | None = None,
    remote: str | None = None,
) -> ShardSource:
    """Open tar shards; the images come in the order of their keys, however they are cut.

    Args:
        root: the data set's folder.
        pattern: pattern of the shards, relative to `root`.
        classes: class names of the training images; None takes them from the shards.
        key: the recipe's key that names `pattern`.
        window: shards that are read at a time; None reads every image at random.
        remote: URL of the shards, of which `root` keeps copies; None: they lie there.

    Raises:
        MissingExtraError: `remote` is given, and fsspec is not installed.
        DataError: no file matches, a shard is damaged, or a label is beyond the classes.
    """
    found = _indexed(root, pattern, key, remote)
    paths, indexes = found.paths, found.indexes
    place = f"{key}: {printable(f'{root}/{pattern}')}"
    if not sum(map(len, indexes)):
        raise DataError(f"{place} holds 0 images{_left_out(indexes)}")
    keys, names = _names(root, paths, indexes)
    order = np.array(
        sorted(range(len(keys)), key=lambda row: os.fsencode(keys[row])), dtype=np.int64
    )
    own = _class_names(indexes, place)
    labels = np.concatenate([index.labels for index in indexes])
    if classes is None:
        classes = tuple(own.get(number, str(number)) for number in range(int(labels.max()) + 1))
    else:
        labels = _as_trained(labels, own, classes, place)
    places = _Places(
        shards=np.repeat(np.arange(len(paths)), [len(index) for index in indexes]),
        offsets=np.concatenate([index.offsets for index in indexes]),
        sizes=np.concatenate([index.sizes for index in indexes]),
        headers=np.concatenate([index.headers for index in indexes]),
    )
    return ShardSource(
        paths,
        NameTable(names[row] for row in order.tolist()),
        places=places.take(order),
        labels=labels[order],
        classes=classes,
        window=window,
        fetch=found.fetch,
    )


def count_shards(
    root: Path, pattern: str, *, key: str = "data.train", remote: str | None = None
) -> int:
    """Count the images of tar shards from their indexes.

    Raises:
        DataError: no file matches, or a shard is damaged.
    """
    return sum(map(len, _indexed(root, pattern, key, remote).indexes))


class _OpenFile:
    """A descriptor that is closed when the last one who reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor, self._size = open_regular(path)
        self.reads = 0

    def read_ahead(self) -> None:
        """Ask for the whole file: in one piece from the disk, then it is read from memory."""
        if hasattr(os, "posix_fadvise"):
            # The system takes no more at a time than it reads ahead by itself.
            for place in range(0, self._size, _AHEAD_BYTES):
                os.posix_fadvise(self.descriptor, place, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """Shards by number, of which a process keeps the latest open.

    Reads do not move a descriptor, so that processes may share one after a fork, and threads too.
    """

    def __init__(
        self, paths: Sequence[Path], *, window: int | None, fetch: Callable[[int], None] | None
    ) -> None:
        self._paths = paths
        # A shard of a window that passed is closed, and so is read ahead when its turn comes again.
        self._most = _OPEN_SHARDS if window is None else 2 * window
        self._fetch = fetch
        self._ahead = window is not None
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()

    def read(self, number: int, *, offset: int, size: int, header: int) -> bytes:
        def once() -> bytes:
            file = self._open.pop(number, None) or self._opened(number)
            file.reads += 1
            # Whoever walks through images that were shuffled over the shards comes once and goes.
            if self._ahead and file.reads == 2:
                file.read_ahead()
            content = read_image(file.descriptor, offset=offset, size=size, header=header)
            self._open[number] = file  # not after an error: the next try opens it anew
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return content

        return patiently(once)

    def _opened(self, number: int) -> _OpenFile:
        if self._fetch is not None and not self._paths[number].exists():
            self._fetch(number)
        error: OSError | None = None
        for _ in range(2):
            try:
                return _OpenFile(self._paths[number])
            except OSError as found:
                if found.errno != errno.EMFILE:
                    raise
                error = found
            # Other sources of this process have opened theirs: these are given up for it.
            self._open.clear()
        raise StorageError(
            f"{printable(str(self._paths[number]))}: too many open files; allow more with"
            " `ulimit -n`, or make fewer and larger shards"
        ) from error

    @override
    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


@dataclass(frozen=True)
class _Indexed:
    paths: list[Path]
    indexes: list[ShardIndex]
    fetch: Callable[[int], None] | None


def _indexed(root: Path, pattern: str, key: str, remote: str | None) -> _Indexed:
    """Find the shards and their indexes, and say what is not read."""
    fetch = None
    if remote is None:
        paths = matching_files(root, pattern, key=key, what=FILES)
        with ThreadPoolExecutor(min(len(paths), _INDEXED_AT_ONCE)) as threads:
            found = list(threads.map(index_shard, paths))
        for folder in sorted({path.parent for path in paths}):
            there = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
            check_complete(folder, there)
    else:
        from bigsimclr.data.remote import RemoteShards

        shards = RemoteShards(remote, root)
        names = shards.find(pattern, key=key)
        paths = [root / name for name in names]
        with ThreadPoolExecutor(min(len(paths), _INDEXED_AT_ONCE)) as threads:
            found = list(threads.map(shards.index, names))
        fetch = partial(_fetch, shards, names)
    indexes = [index for index, _ in found]
    unkept = sum(not kept for _, kept in found)
    if unkept:
        logger.info(
            "%s cannot be written: %s in memory, and again at the next start",
            printable(str(root)),
            "the index of 1 shard is kept" if unkept == 1 else f"{unkept} indexes are kept",
        )
    left_out = _left_out(indexes)
    if left_out:
        logger.warning("%s%s", printable(f"{root}/{pattern}"), left_out)
    return _Indexed(paths, indexes, fetch)


def _fetch(shards: "RemoteShards", names: Sequence[str], number: int) -> None:
    shards.fetch(names[number])


def _left_out(indexes: Sequence[ShardIndex]) -> str:
    total: Counter[str] = Counter()
    for index in indexes:
        total.update(index.left_out)
    if not total:
        return ""
    most = ", ".join(f"{count} x {printable(what)}" for what, count in total.most_common(5))
    return f"; left out of the shards: {most}"


def _names(
    root: Path, paths: Sequence[Path], indexes: Sequence[ShardIndex]
) -> tuple[list[str], list[str]]:
    """Return the keys by which images are ordered, and their names; each unique."""
    keys = [key for index in indexes for key in index.keys]
    suffixes = [suffix for index in indexes for suffix in index.suffixes]
    if len(set(keys)) < len(keys):
        folders = [path.relative_to(root).as_posix() for path in paths]
        keys = [
            f"{folder}/{key}"
            for folder, index in zip(folders, indexes, strict=True)
            for key in index.keys
        ]
    members = [f"{key}.{suffix}" for key, suffix in zip(keys, suffixes, strict=True)]
    names = [name for index in indexes for name in index.names]
    is_usable = all(names) and len(set(names)) == len(names)
    return keys, names if is_usable else members


def _class_names(indexes: Sequence[ShardIndex], place: str) -> dict[int, str]:
    classes: dict[int, str] = {}
    for index in indexes:
        for number, name in index.classes.items():
            known = classes.setdefault(number, name)
            if known != name:
                both = f"'{printable(known)}' and '{printable(name)}'"
                raise DataError(f"{place}: class {number} is called {both} in two shards")
    return classes


def _as_trained(
    labels: Integers, own: dict[int, str], classes: tuple[str, ...], place: str
) -> Integers:
    """Number held-out labels as the training images have them: by name where they have names."""
    shown = np.unique(labels[labels >= 0]).tolist()
    numbers = {name: number for number, name in enumerate(classes)}
    # A class without a name in these shards goes by its number.
    named = [own.get(n, classes[n] if n < len(classes) else str(n)) for n in shown]
    unknown = [name for name in named if name not in numbers]
    if unknown:
        raise DataError(
            f"{place} has images of {counted(len(unknown), 'class', 'classes')} without training"
            f" images: {some(unknown)}"
        )
    table = np.full(max(shown, default=0) + 2, -1, np.int64)
    table[shown] = [numbers[name] for name in named]
    return table[labels]  # -1 takes the last place, which is -1
