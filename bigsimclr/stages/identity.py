"""The names of a run's images, kept beside it, to say what changed when it is not continued."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np

from bigsimclr.data import Source
from bigsimclr.data.names import counted, some
from bigsimclr.storage import whole_file

NAME = "images.json.gz"
_PARTS = ("training images", "held-out images")


def note_images(directory: Path, train: Source, held_out: Source | None) -> None:
    """Write down the name and the label of every image.

    Raises:
        StorageError: the directory cannot be written.
    """
    parts = {
        part: {"names": _names(source), "labels": source.labels.tolist()}
        for part, source in zip(_PARTS, (train, held_out), strict=True)
        if source is not None
    }
    with whole_file(directory / NAME, overwrite=True) as beside:
        # The same bytes for the same images: without the time.
        beside.write_bytes(gzip.compress(json.dumps(parts).encode(), compresslevel=3, mtime=0))


def image_changes(directory: Path, train: Source, held_out: Source | None) -> str:
    """Say how images differ from those a run began with, behind a colon; "" where nobody knows."""
    try:
        before = json.loads(gzip.decompress((directory / NAME).read_bytes()))
        texts = [
            f"{part}: {text}"
            for part, source in zip(_PARTS, (train, held_out), strict=True)
            if source is not None and part in before
            for text in _changes(before[part]["names"], before[part]["labels"], source)
        ]
    except (OSError, EOFError, LookupError, TypeError, ValueError, zlib.error):
        return ""
    return "; ".join(texts)


def _changes(names: list[str], labels: list[int], now: Source) -> list[str]:
    shown = _names(now)
    before = dict(zip(names, labels, strict=True))
    after = dict(zip(shown, now.labels.tolist(), strict=True))
    added = [name for name in shown if name not in before]
    gone = [name for name in names if name not in after]
    other = [name for name in names if name in after and after[name] != before[name]]
    counts = [
        f"{sign}{len(found)} {what} ({some(found)})"
        for sign, what, found in (
            ("+", "new", added),
            ("-", "gone", gone),
            ("", "with another label", other),
        )
        if found
    ]
    if counts:
        return [f"{', '.join(counts)} of {counted(len(names), 'image')}"]
    if shown != names or not np.array_equal(now.labels, labels):
        return ["the same names in another order"]
    return []


def _names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]
