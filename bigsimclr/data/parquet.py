"""Parquet files as Hugging Face writes them: a column `image` {bytes, path}, perhaps `label`."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Sample
from bigsimclr.data.names import NameTable, fingerprint, printable
from bigsimclr.data.places import matching_files
from bigsimclr.errors import DataError, MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError(
        "data.kind: parquet needs the package pyarrow: pip install 'bigsimclr[parquet]'"
    ) from error

logger = logging.getLogger(__name__)

FILES: Final = "parquet files"
# Up to this size the encoded images are held in memory, shared by all workers. Beyond it every
# read decodes a whole row group, of which each worker keeps a few.
HELD_BYTES: Final = 4 << 30
_KEPT_GROUPS: Final = 4


@dataclass(frozen=True)
class _Group:
    """One row group of one file, the smallest part that can be read alone."""

    path: Path
    number: int
    rows: int
    bytes: int  # of the image column, not compressed


@dataclass(frozen=True)
class _Encoded:
    """Encoded images one behind the other, in two buffers that workers share untouched."""

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]  # [n + 1]

    def __getitem__(self, row: int) -> bytes:
        return self.content[self.ends[row] : self.ends[row + 1]].tobytes()


class _Files:
    """The encoded images of some files by row, counted through all of them."""

    def __init__(self, groups: list[_Group], held_bytes: int) -> None:
        self.layout = "\n".join(f"{group.path.name} {group.rows} {group.bytes}" for group in groups)
        self._groups = groups
        self._starts = np.cumsum([0, *(group.rows for group in groups)])
        self._recent: dict[int, _Encoded] = {}
        self._held: list[_Encoded] | None = None
        self.bytes = sum(group.bytes for group in groups)
        if self.bytes <= held_bytes:
            self._held = [_read_group(group) for group in groups]
        else:
            logger.warning(
                "%.1f GiB of images in parquet files are too much to keep in memory: every image"
                " read at random decodes a whole row group. A folder of files is faster",
                self.bytes / 2**30,
            )

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row; empty where the row has none."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._group(number)[row - int(self._starts[number])]

    def _group(self, number: int) -> _Encoded:
        if self._held is not None:
            return self._held[number]
        if number not in self._recent:
            if len(self._recent) >= _KEPT_GROUPS:
                self._recent.pop(next(iter(self._recent)))
            self._recent[number] = _read_group(self._groups[number])
        return self._recent[number]


class ParquetSource:
    """Read encoded images from parquet files; open them with `open_parquet`."""

    def __init__(
        self,
        files: _Files,
        names: NameTable,  # of the N images
        *,
        rows: NDArray[np.int64],  # [N] rows of the images, counted through all files
        labels: NDArray[np.int64],  # [N], -1 where there is none
        classes: tuple[str, ...],
    ) -> None:
        self.labels = labels
        self.classes = classes
        self.image_size: tuple[int, int] | None = None
        self.fingerprint = fingerprint(
            [
                os.fsencode(files.layout),
                names.content,
                rows.tobytes(),
                labels.tobytes(),
                *map(os.fsencode, classes),
            ]
        )
        self._files = files
        self._names = names
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the images of all files, of parts that were taken as well."""
        return self._files.bytes

    def name(self, index: int) -> str:
        """Return the stored path of image `index`; its file and row where paths are not unique."""
        return self._names[index]

    def read(self, index: int) -> Sample:
        """Return image `index`, still encoded.

        Raises:
            OSError: the file cannot be read.
            DataError: the file is damaged.
        """
        content = self._files.read(int(self._rows[index]))
        return Sample(image=content, label=int(self.labels[index]), index=index)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return a source of `rows` alone, which shares the images in memory; names stay."""
        return type(self)(
            self._files,
            self._names.take(rows),
            rows=self._rows[rows],
            labels=self.labels[rows],
            classes=self.classes,
        )


def open_parquet(
    root: Path,
    pattern: str,
    *,
    classes: tuple[str, ...] | None = None,
    key: str = "data.train",
    held_bytes: int = HELD_BYTES,
) -> ParquetSource:
    """Open parquet files, in the order of their names.

    Args:
        root: the data set's folder.
        pattern: pattern of the files, relative to `root`.
        classes: class names of the training images; None reads them from the files.
        key: the recipe's key that names `pattern`.
        held_bytes: most bytes of encoded images that are held in memory.

    Raises:
        DataError: no file matches, one is damaged or laid out otherwise, or a label is beyond the
            classes.
    """
    paths = matching_files(root, pattern, key=key, what=FILES)
    groups = [group for path in paths for group in _row_groups(path)]
    count = sum(group.rows for group in groups)
    if not count:
        raise DataError(f"{key}: {printable(f'{root}/{pattern}')} holds 0 images")
    labels = np.concatenate([_labels(path) for path in paths])
    named = _classes(paths[0], labels) if classes is None else classes
    if named and labels.max() >= len(named):
        raise DataError(
            f"{key}: {printable(f'{root}/{pattern}')}: label {labels.max()} is beyond the"
            f" {len(named)} classes of the training images"
        )
    return ParquetSource(
        _Files(groups, held_bytes),
        _names(root, paths),
        rows=np.arange(count, dtype=np.int64),
        labels=labels,
        classes=named,
    )


def count_parquet(root: Path, pattern: str, *, key: str = "data.train") -> int:
    """Count the images from the files' metadata.

    Raises:
        DataError: no file matches, or one is damaged.
    """
    paths = matching_files(root, pattern, key=key, what=FILES)
    return sum(group.rows for path in paths for group in _row_groups(path))


def _opened(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{printable(str(path))} is not a parquet file: {error}") from error
    schema = file.schema_arrow
    column = schema.field("image").type if "image" in schema.names else None
    if column is None or not pa.types.is_struct(column) or column.get_field_index("bytes") < 0:
        raise DataError(f"{printable(str(path))} has no column `image` with a field `bytes`")
    return file


def _row_groups(path: Path) -> list[_Group]:
    with _opened(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [
        _Group(path=path, number=number, rows=group.num_rows, bytes=_image_bytes(group))
        for number, group in enumerate(groups)
    ]


def _image_bytes(group: pq.RowGroupMetaData) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(
        int(column.total_uncompressed_size)
        for column in columns
        if column.path_in_schema == "image.bytes"
    )


def _read_group(group: _Group) -> _Encoded:
    try:
        with _opened(group.path) as file:
            # One thread: a thread pool does not survive the fork into worker processes.
            table = file.read_row_group(group.number, columns=["image.bytes"], use_threads=False)
    except pa.ArrowException as error:
        raise DataError(f"{printable(str(group.path))}: {error}") from error
    images = pa.chunked_array(table.column("image")).combine_chunks()
    values = pc.struct_field(images, "bytes").cast(pa.large_binary())
    # The Arrow layout: offsets of every value, then all values one behind the other; a missing
    # value takes no bytes.
    _, offsets, content = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    held = np.frombuffer(content or b"", np.uint8)[ends[0] : ends[-1]]
    return _Encoded(held.copy(), ends - ends[0])


def _labels(path: Path) -> NDArray[np.int64]:
    with _opened(path) as file:
        if "label" not in file.schema_arrow.names:
            return np.full(file.metadata.num_rows, -1, np.int64)
        kind = file.schema_arrow.field("label").type
        if not pa.types.is_integer(kind):
            raise DataError(
                f"{printable(str(path))}: column `label` is {kind}; it must be whole numbers"
            )
        column = file.read(columns=["label"], use_threads=False).column("label")
    filled: NDArray[np.int64] = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    return np.maximum(filled, -1)


def _classes(path: Path, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Read the class names that Hugging Face stores; else the classes are called by number."""
    if labels.max() < 0:
        return ()
    with _opened(path) as file:
        stored = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(stored)["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        names = [str(number) for number in range(int(labels.max()) + 1)]
    return tuple(str(name) for name in names)


def _names(root: Path, paths: list[Path]) -> NameTable:
    stored: list[str | None] = []
    numbered: list[str] = []
    for path in paths:
        with _opened(path) as file:
            rows = file.metadata.num_rows
            if file.schema_arrow.field("image").type.get_field_index("path") < 0:
                stored += [None] * rows
            else:
                column = file.read(columns=["image.path"], use_threads=False).column("image")
                stored += [row and row["path"] for row in column.to_pylist()]
        place = path.relative_to(root).as_posix()
        numbered += [f"{place}#{row:07d}" for row in range(rows)]
    names = [name for name in stored if name]
    return NameTable(names if len(set(names)) == len(numbered) else numbered)
