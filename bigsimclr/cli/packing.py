"""Commands that lay images out on disk for fast reading."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bigsimclr.data.pack import Packable, Progress

SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images, one sub-folder per class, or parquet files by name or pattern.",
    ),
]


def data_pack(
    source: SourceArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the shards.")],
    shard_mb: Annotated[
        int, typer.Option(metavar="N", min=1, help="Megabytes that shards come near to.")
    ] = 256,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that read and write.")
    ] = 1,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order", help="Keep the source's order, else classes are mixed in every shard."
        ),
    ] = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Sub-folders are no classes.")
    ] = False,
) -> None:
    """Pack images into tar shards.

    In the WebDataset layout, encoded bytes unchanged, every one read back and compared. The same
    command continues where a killed one stopped. A recipe reads them with data.kind=shards.
    """
    from bigsimclr.data.names import counted
    from bigsimclr.data.pack import pack

    show = _Line()
    packed = pack(
        _opened(source, labelled=not unlabelled),
        out,
        shard_bytes=shard_mb * 1_000_000,
        shuffled=not in_order,
        workers=workers,
        report=show,
    )
    show.end()
    size = sum(file.bytes for file in packed.files)
    shards = counted(packed.shards, "shard")
    print(f"{out}: {counted(packed.images, 'image')} in {shards}, {size:,} bytes, verified")


def data_index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write.")],
) -> None:
    """Write down which images a folder holds.

    With data.manifest=FILE, a recipe reads the list instead of walking through the folder, which
    takes minutes where there are millions of files. The folder is data.root.
    """
    from bigsimclr.data.manifest import write_manifest
    from bigsimclr.data.places import require_folder

    require_folder(folder, "")
    found = write_manifest(folder, out)
    print(f"{out}: {len(found.names):,} images, {int(found.sizes.sum()):,} bytes")
    if not all(found.folders.values()):
        print(
            "folders changed within the last seconds; run this again, else every start walks"
            " through all of them to be sure",
            file=sys.stderr,
        )


class _Line:
    """One line of progress, written over on a terminal, now and then anew elsewhere."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._told = self._begun
        self._over = sys.stderr.isatty()
        self._doing = ""

    def __call__(self, progress: "Progress") -> None:
        now = time.monotonic()
        if progress.doing != self._doing:
            # What a shard of the second pass took was spent since the first one's end.
            self._doing, self._begun = progress.doing, self._told
        elif now - self._told < (0.1 if self._over else 10) and progress.shards < progress.of:
            return
        self._told = now
        seconds = max(now - self._begun, 1e-3)
        text = (
            f"{progress.shards} of {progress.of} shards {progress.doing}, "
            f"{progress.images / seconds:,.0f} images/s, {progress.bytes / seconds / 1e6:,.0f} MB/s"
        )
        print(
            f"\r{text}\x1b[K" if self._over else text,
            end="" if self._over else "\n",
            file=sys.stderr,
        )

    def end(self) -> None:
        """Leave the line, which then stays."""
        if self._over and self._doing:
            print(file=sys.stderr)


def _opened(source: Path, *, labelled: bool) -> "Packable":
    if source.suffix == ".parquet":
        from bigsimclr.data.parquet import open_parquet
        from bigsimclr.data.places import split_pattern

        return open_parquet(*split_pattern(source), key="SOURCE")
    from bigsimclr.data.folder import training_folder

    return training_folder(source, ".", labelled=labelled, root_key="")
