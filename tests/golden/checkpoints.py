"""The official checkpoints of the stored cases."""

import tarfile
from collections.abc import Iterator
from pathlib import Path


def checkpoints(case: Path, scratch: Path) -> dict[str, Path]:
    """Return the folder of each form in which the weights of a case are stored.

    Args:
        case: the folder of the case; any form may be missing.
        scratch: an empty folder, into which an archived SavedModel is unpacked.
    """
    return dict(_found(case, scratch))


def _found(case: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    for form in ("tf1", "tf2"):
        if any((case / form).glob("*.index")):
            yield form, case / form
    for archive in case.glob("**/saved_model.tar.gz"):
        unpack(archive, scratch)
        yield "saved_model", scratch


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file of our own."""
    with tarfile.open(archive) as opened:
        # Python before 3.11.4 knows no filters, and later ones want one named.
        if hasattr(tarfile, "data_filter"):
            opened.extractall(folder, filter="data")
        else:
            opened.extractall(folder)
