"""A list of a folder's images in a file, so that millions need not be looked for at every start."""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from bigsimclr.data.listing import Listing, walk_folder, warn_of_left_out
from bigsimclr.data.names import counted, fingerprint, printable, some
from bigsimclr.data.places import require_file
from bigsimclr.errors import DataError
from bigsimclr.storage import publish

_FORMAT: Final = "bigsimclr folder manifest 1"


def write_manifest(root: Path, path: Path) -> Listing:
    """Walk through a folder and write down which images it holds.

    Raises:
        DataError: it holds no images.
        StorageError: the file cannot be written.
    """
    found = walk_folder(root, "")
    warn_of_left_out(found, root)
    content = {
        "format": _FORMAT,
        "images": len(found.names),
        "fingerprint": _fingerprint(found),
        "folders": found.folders,
        "left_out": found.left_out,
        "names": found.names,
        "sizes": found.sizes.tolist(),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    publish(path, "{" + ",\n".join(lines) + "}\n")
    return found


def listed_images(manifest: Path, root: Path, folder: str, *, key: str) -> Listing:
    """Return the images below `root`/`folder` from a manifest of `root`.

    Where a folder changed after the manifest was written, all are walked through, and the manifest
    is refused unless the images are the same.

    Args:
        manifest: the file.
        root: the folder it was written for.
        folder: the part that is wanted, relative to `root`.
        key: the recipe's key that names the manifest.

    Raises:
        DataError: the manifest is damaged, out of date, or lists no image there.
    """
    shown = f"{key}: {printable(str(manifest))}"
    hint = f"write it with: bigsimclr data index {printable(str(root))} -o FILE"
    require_file(manifest, key, missing_hint=hint)
    parts = PurePosixPath(folder).parts
    if ".." in parts or PurePosixPath(folder).is_absolute():
        raise DataError(f"{shown}: {printable(folder)} is not below {printable(str(root))}")
    found = _below(_read(manifest, shown), "/".join(parts))
    if not found.names:
        raise DataError(f"{shown} lists no image below {printable(folder)}")
    path = root / folder
    if not all(_is_as_it_was(path / name, time) for name, time in found.folders.items()):
        _compare(found, walk_folder(path, ""), shown, root)
    return found


def _read(path: Path, shown: str) -> Listing:
    try:
        content = json.loads(path.read_bytes())
        found = Listing(
            names=[str(name) for name in content["names"]],
            sizes=np.array(content["sizes"], np.int64),
            folders={str(name): int(time) for name, time in content["folders"].items()},
            left_out={str(name): str(reason) for name, reason in content["left_out"].items()},
        )
        is_whole = content["format"] == _FORMAT and content["fingerprint"] == _fingerprint(found)
    except OSError as error:
        raise DataError(f"{shown}: {error.strerror}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        is_whole, found = False, Listing([], np.zeros(0, np.int64), {}, {})
    unsafe = [name for name in (*found.names, *found.folders) if _leaves(name)]
    if not is_whole or unsafe or len(found.names) != len(found.sizes):
        raise DataError(f"{shown} is not a manifest, or is damaged; write it again")
    return found


def _leaves(name: str) -> bool:
    return name.startswith("/") or "\0" in name or ".." in name.split("/")


def _below(found: Listing, folder: str) -> Listing:
    """Keep what lies below a folder."""
    if not folder:
        return found
    front = f"{folder}/"
    rows = [row for row, name in enumerate(found.names) if name.startswith(front)]
    folders = {
        name.removeprefix(folder).removeprefix("/"): time
        for name, time in found.folders.items()
        if name == folder or name.startswith(front)
    }
    left_out = {
        name.removeprefix(front): reason
        for name, reason in found.left_out.items()
        if name.startswith(front)
    }
    names = [found.names[row].removeprefix(front) for row in rows]
    return Listing(names, found.sizes[rows], folders, left_out)


def _is_as_it_was(folder: Path, time: int) -> bool:
    try:
        return folder.stat().st_mtime_ns == time
    except OSError:
        return False


def _compare(listed: Listing, walked: Listing, shown: str, root: Path) -> None:
    before, now = _sizes(listed), _sizes(walked)
    added = [name for name in walked.names if name not in before]
    gone = [name for name in listed.names if name not in now]
    other = [name for name in listed.names if name in now and now[name] != before[name]]
    if not added and not gone and not other:
        return
    counts = [
        text
        for text, names in (
            (f"{len(added)} new ({some(added)})", added),
            (f"{len(gone)} gone ({some(gone)})", gone),
            (f"{len(other)} of another size ({some(other)})", other),
        )
        if names
    ]
    raise DataError(
        f"{shown} is out of date: of {counted(len(listed.names), 'image')}, {', '.join(counts)};"
        f" write it again with: bigsimclr data index {printable(str(root))} -o FILE"
    )


def _sizes(found: Listing) -> Mapping[str, int]:
    return dict(zip(found.names, found.sizes.tolist(), strict=True))


def _fingerprint(found: Listing) -> str:
    return fingerprint([*map(os.fsencode, found.names), found.sizes.tobytes()])
