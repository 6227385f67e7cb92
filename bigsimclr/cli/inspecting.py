"""Commands that look at the images of a recipe, or of a folder, and change nothing."""

import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from bigsimclr.cli.command import OverridesArgument, RecipeArgument
from bigsimclr.errors import RecipeError

if TYPE_CHECKING:
    from bigsimclr.data import Splits
    from bigsimclr.data.scan import Scan
    from bigsimclr.recipe.schema import AnyStage

logger = logging.getLogger(__name__)

_OF_MANY: Final = (".tar", ".parquet")  # files of which each holds many images

ImagesArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe; or images themselves: a folder (with train and val in it, if there are "
        "held-out images), one of tar shards or parquet files, or these by name or pattern, or an "
        ".npz file.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Processes; default: one for each core."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def data_scan(
    images: ImagesArgument,
    overrides: OverridesArgument = None,
    *,
    workers: WorkersOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="JSON Lines file to write: every finding."
        ),
    ] = None,
    show: Annotated[
        int, typer.Option(metavar="N", min=0, help="Images named under each heading.")
    ] = 5,
    bits: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, max=16, help="Bits of 64 in which hashes of images alike differ."
        ),
    ] = 4,
    as_json: JsonOption = False,
) -> None:
    """Open every image: broken ones, sizes, classes, copies, leaks.

    A leak is a held-out image with the bytes of a training image, or one that looks like it by a
    perceptual hash and a small picture; images under 32 pixels and plain ones are compared by
    their bytes alone.

    Exit code 3 where an image is broken or leaks, else 0; copies among training images are told.
    """
    from bigsimclr.cli.findings import scan_text, verdict
    from bigsimclr.data.processes import cores
    from bigsimclr.data.scan import scan
    from bigsimclr.errors import DataError
    from bigsimclr.storage import whole_file

    opened = _opened(images, overrides or [])
    with nullcontext() if out is None else whole_file(out, overwrite=False) as listed:
        found = scan(
            opened.splits,
            max_pixels=opened.max_pixels,
            workers=cores() if workers is None else workers,
            most_differing_bits=bits,
            tell=_progress("scanned", opened.count),
        )
        if as_json:
            print(json.dumps(asdict(found) | {"is_clean": found.is_clean}, indent=2))
        else:
            print(scan_text(found, shown=show, bits=bits))
        if listed is not None:
            listed.write_text(_lines(found), encoding="utf-8")
    if not found.is_clean:
        place = "" if out is None else f"; listed in {out}"
        raise DataError(f"{verdict(found)}{place}")


def data_stats(
    images: ImagesArgument,
    overrides: OverridesArgument = None,
    *,
    workers: WorkersOption = None,
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Measure N training images at equal distances; default: all."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the training images: sizes, colours, decoding speed.

    Mean and standard deviation are over all pixels. Images that cannot be read are left out.
    """
    from bigsimclr.cli.findings import statistics_text
    from bigsimclr.data.measure import measure
    from bigsimclr.data.processes import cores

    opened = _opened(images, overrides or [])
    train = len(opened.splits.train)
    found = measure(
        opened.splits,
        max_pixels=opened.max_pixels,
        sample=sample,
        workers=cores() if workers is None else workers,
        tell=_progress("measured", train if sample is None else min(sample, train)),
    )
    if as_json:
        speed = {"decoded_per_core_second": found.decoded_per_core_second}
        print(json.dumps(asdict(found) | speed, indent=2))
    else:
        print(statistics_text(found))


def data_preview(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help=".png or .html file to write."),
    ] = Path("preview.png"),
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images to show.")] = 8,
) -> None:
    """Show the views that training makes of the first images.

    Each row is an image with the crops marked in it, and its views. The page also says what was
    drawn. Of a pipeline, the first step is shown.
    """
    from bigsimclr.data.names import counted
    from bigsimclr.stages.preview import SUFFIXES, examples, write_preview

    if out.suffix.lower() not in SUFFIXES:
        raise RecipeError(f"data preview: {out} must end in {' or '.join(SUFFIXES)}")
    shown = examples(_first_stage(recipe, overrides or []), images)
    write_preview(shown, out, title=" ".join([recipe, *(overrides or [])]))
    print(f"{out}: views of {counted(len(shown), 'image')}")


@dataclass(frozen=True)
class _Opened:
    """The images that a command line names."""

    splits: "Splits"
    max_pixels: int

    @property
    def count(self) -> int:
        apart = self.splits.held_out
        return len(self.splits.train) + (0 if apart is None else len(apart))


def _opened(images: str, overrides: list[str]) -> _Opened:
    """Open the images of a recipe, or those that lie at a path."""
    from bigsimclr.data import build_data
    from bigsimclr.data.places import expanded
    from bigsimclr.recipe import list_recipes
    from bigsimclr.recipe.sections import InputSection

    # A folder may be called as a recipe that ships; `digits/` is the folder.
    found = None if images in list_recipes() else _lying_at(expanded(Path(images), ""))
    if found is not None:
        if overrides:
            raise RecipeError(f"{overrides[0]}: {images} is no recipe and has no keys to change")
        return _Opened(found, InputSection().max_pixels)
    recipe = _first_stage(images, overrides, same_images=True)
    return _Opened(build_data(recipe.data), recipe.input.max_pixels)


def _lying_at(path: Path) -> "Splits | None":
    """Open the images at a path; None where it must be a recipe's."""
    from bigsimclr.data import build_data
    from bigsimclr.data.folder import found_folder
    from bigsimclr.data.listing import SUFFIXES, first_level, is_folder
    from bigsimclr.data.places import is_folder_at, split_pattern
    from bigsimclr.errors import DataError
    from bigsimclr.recipe.sources import ArraysData

    if path.suffix == ".npz":
        return build_data(ArraysData(kind="arrays", root=path))
    if is_folder_at(path):
        level = first_level(path)
        files = [entry.name for entry in level if entry.name.endswith(_OF_MANY)]
        if not files:
            return found_folder(path)
        kinds = sorted({Path(name).suffix for name in files})
        if len(kinds) > 1 or any(
            is_folder(entry) or Path(entry.name).suffix.lower() in SUFFIXES for entry in level
        ):
            raise DataError(
                f"{path} holds {' and '.join(kinds)} files, and other images or folders: name"
                f" '{path}/*{kinds[0]}', or move them elsewhere"
            )
        return _files(path, f"*{kinds[0]}", files)
    return _files(*split_pattern(path), []) if path.suffix in _OF_MANY else None


def _files(root: Path, pattern: str, names: list[str]) -> "Splits":
    """Open shards or parquet files; those called train and val are training and held-out ones."""
    from bigsimclr.data import build_data
    from bigsimclr.data.folder import HELD_OUT_NAMES
    from bigsimclr.data.names import printable, some
    from bigsimclr.recipe.sources import ParquetData, ShardsData

    suffix = Path(pattern).suffix
    apart = [kind for kind in HELD_OUT_NAMES if any(name.startswith(kind) for name in names)]
    train, held_out = pattern, None
    if apart and any(name.startswith("train") for name in names):
        train, held_out = f"train*{suffix}", f"{apart[0]}*{suffix}"
        unread = [name for name in names if not name.startswith(("train", apart[0]))]
        if unread:
            shown = printable(str(root)), train, held_out, some(unread)
            logger.warning("%s: not read, beside %s and %s: %s", *shown)
    if suffix == ".tar":
        return build_data(ShardsData(kind="shards", root=root, train=train, held_out=held_out))
    return build_data(ParquetData(kind="parquet", root=root, train=train, held_out=held_out))


def _first_stage(name: str, overrides: list[str], *, same_images: bool = False) -> "AnyStage":
    """Read a recipe; of a pipeline, the first step, if need be one that reads what all read."""
    from bigsimclr.recipe import find_recipe, is_pipeline, load_recipe, parse_overrides
    from bigsimclr.recipe.pipeline import plan_pipeline
    from bigsimclr.recipe.schema import PipelineRecipe

    source = find_recipe(name)
    loaded = load_recipe(source, () if is_pipeline(source) else overrides)
    if not isinstance(loaded, PipelineRecipe):
        return loaded
    runs = plan_pipeline(
        loaded, source=source, overrides=parse_overrides(overrides), directory=Path("runs")
    )
    first = runs[0].recipe
    apart = next((run for run in runs if run.recipe.data != first.data), None)
    if same_images and apart is not None:
        raise RecipeError(
            f"{name} is a pipeline whose steps '{runs[0].step}' and '{apart.step}' read different"
            " images; name the recipe of one step"
        )
    return first


def _lines(found: "Scan") -> str:
    kinds = ("broken", "copies", "alike", "leaks", "leaks_alike")
    lines = [
        json.dumps({"finding": kind} | asdict(item))
        for kind in kinds
        for item in getattr(found, kind)
    ]
    return "".join(f"{line}\n" for line in lines)


def _progress(what: str, count: int) -> Callable[[int], None]:
    """Return what counts on a terminal, and says nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda _: None

    def tell(done: int) -> None:
        if done % 100 == 0 or done == count:
            end = "\n" if done == count else ""
            print(f"\r{what} {done:,} of {count:,} images", end=end, file=sys.stderr, flush=True)

    return tell
