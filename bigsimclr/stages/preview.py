"""What augmentation makes of the first images of a run, as a picture or a page.

Shapes: V views of S x S pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

import numpy as np
from numpy.typing import NDArray

from bigsimclr.augment.draws import Draws
from bigsimclr.data.chunks import image_at
from bigsimclr.data.decode import encode_png, fitted
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import RecipeError
from bigsimclr.recipe.schema import (
    AnyStage,
    DistillRecipe,
    FinetuneRecipe,
    KnnRecipe,
    LinearRecipe,
    PretrainRecipe,
    SupervisedRecipe,
)
from bigsimclr.report.preview import PreviewRow, Shown, preview_page
from bigsimclr.stages.inputs import Inputs, open_inputs
from bigsimclr.storage import publish, whole_file
from bigsimclr.world import ALONE

Pixels = NDArray[np.uint8]

SUFFIXES: Final = (".png", ".html")

_SMALLEST: Final = 96  # pixels that a view is shown with at least
_GAP: Final = 8
_PAPER: Final = 245  # grey of the sheet
_FRAMES: Final = ((11, 122, 95), (214, 96, 20))  # of the first and of the second view
_OPERATIONS: Final = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Example:
    """An image and the views that training makes of it."""

    name: str
    class_name: str  # "" where the stage knows none
    original: Pixels  # [h, w, 3]
    boxes: NDArray[np.int32]  # [V, 4], crops as (y, x, height, width)
    views: Pixels  # [V, S, S, 3]
    words: tuple[str, ...]  # V descriptions of what was drawn


def examples(recipe: AnyStage, images: int) -> list[Example]:
    """Make the views of the first images that a recipe trains on.

    They are those of training: the same images, crops, colours and blur.

    Args:
        recipe: a stage that trains.
        images: how many; no more than one epoch has.

    Raises:
        RecipeError: the stage does not train.
        DataError: the images are missing, or too many cannot be read.
    """
    if isinstance(recipe, KnnRecipe):
        raise RecipeError("a knn stage trains nothing and makes no views")
    # Read here, computed in plain PyTorch, and nothing decoded that is not shown.
    quiet = recipe.model_copy(
        update={
            "input": recipe.input.model_copy(
                update={"workers": 0, "resident": False, "decoder": "pillow"}
            ),
            "parallel": recipe.parallel.model_copy(update={"kernels": "plain"}),
        }
    )
    inputs, views = _opened(quiet)
    count = min(images, len(inputs.indices))
    short = quiet.model_copy(
        update={"batch": quiet.batch.model_copy(update={"global_batch": count})}
    )
    (batch,) = inputs.loader(short, views=views).batches(0, 1)
    side = inputs.settings.image_size
    made = inputs.views(batch).view(views, count, 3, side, side).permute(1, 0, 3, 4, 2)
    pixels = made.mul(255).round().byte().numpy()
    return [
        Example(
            name=inputs.train.name(index),
            class_name=inputs.classes[label] if label >= 0 else "",
            original=image_at(inputs.train, index, max_pixels=recipe.input.max_pixels),
            boxes=batch.draws.boxes[:, row],
            views=pixels[row],
            words=tuple(_words(batch.draws, view, row) for view in range(views)),
        )
        for row, (index, label) in enumerate(
            zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)
        )
    ]


def write_preview(shown: list[Example], out: Path, *, title: str) -> None:
    """Write examples as a PNG picture or as an HTML page, whichever `out` is called.

    Raises:
        StorageError: `out` cannot be written.
    """
    if out.suffix.lower() == ".html":
        publish(out, preview_page(title, [_row(example) for example in shown]))
        return
    with whole_file(out, overwrite=True) as beside:
        beside.write_bytes(encode_png(sheet(shown)))


def sheet(shown: list[Example]) -> Pixels:
    """Lay examples out as one picture: a row each, the image before its views."""
    rows = [[_marked(example), *_framed(example)] for example in shown]
    side = max(cell.shape[axis] for row in rows for cell in row for axis in (0, 1))
    step = side + _GAP
    height, width = len(rows) * step + _GAP, len(rows[0]) * step + _GAP
    paper = np.full((height, width, 3), _PAPER, np.uint8)
    for down, row in enumerate(rows):
        for across, cell in enumerate(row):
            y, x = _GAP + down * step, _GAP + across * step
            paper[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return paper


def _opened(
    recipe: PretrainRecipe | LinearRecipe | FinetuneRecipe | SupervisedRecipe | DistillRecipe,
) -> tuple[Inputs, int]:
    """Open the images as the stage does, and say how many views it makes."""
    stop = StopRequest()
    match recipe:
        case PretrainRecipe():
            return open_inputs(recipe, labels=None, walk="all", world=ALONE, stop=stop), 2
        case LinearRecipe() | FinetuneRecipe() | SupervisedRecipe():
            shown = recipe.labels
            return open_inputs(recipe, labels=shown, walk="labelled", world=ALONE, stop=stop), 1
        case DistillRecipe():
            mixed = recipe.labels
            return open_inputs(recipe, labels=mixed, walk="all", world=ALONE, stop=stop), 1
        case _:
            assert_never(recipe)


def _words(draws: Draws, view: int, row: int) -> str:
    y, x, height, width = draws.boxes[view, row].tolist()
    words = [f"crop {width} x {height} at ({x}, {y})"]
    words += ["mirrored"] * bool(draws.flip[view, row])
    if draws.jitter[view, row]:
        factors = draws.factors[view, row]
        words += [
            f"{_OPERATIONS[operation]} "
            + (f"{factors[3]:+.2f}" if operation == 3 else f"x {factors[operation]:.2f}")
            for operation in draws.order[view, row].tolist()
        ]
    words += ["grey"] * bool(draws.grey[view, row])
    words += [f"blur {draws.sigma[view, row]:.1f} px"] * bool(draws.blur[view, row])
    return ", ".join(words)


def _side(example: Example) -> int:
    side = int(example.views.shape[1])
    return side * max(1, -(-_SMALLEST // side))


def _marked(example: Example) -> Pixels:
    """Bring the image to the size of a view, and frame the crops in it."""
    height, width = example.original.shape[:2]
    small = fitted(example.original, _side(example)).copy()
    scale = np.array([small.shape[0] / height, small.shape[1] / width])
    for box, colour in zip(example.boxes, _FRAMES, strict=False):
        top, left = np.floor(box[:2] * scale).astype(int).tolist()
        low, right = np.ceil((box[:2] + box[2:]) * scale).astype(int).tolist()
        _frame(small[top:low, left:right], colour)
    return small


def _framed(example: Example) -> Iterator[Pixels]:
    for view, colour in zip(example.views, _FRAMES, strict=False):
        large = fitted(view, _side(example))
        framed = np.pad(large, ((2, 2), (2, 2), (0, 0)))
        _frame(framed, colour)
        yield framed


def _frame(
    pixels: Pixels,  # [h, w, 3], changed
    colour: tuple[int, int, int],
) -> None:
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        edge[...] = colour


def _row(example: Example) -> PreviewRow:
    height, width = example.original.shape[:2]
    words = f"{example.name}, {width} x {height}"
    if example.class_name:
        words += f", class {example.class_name}"
    return PreviewRow(
        original=Shown(encode_png(_marked(example)), words),
        views=tuple(
            Shown(encode_png(pixels), text)
            for pixels, text in zip(_framed(example), example.words, strict=True)
        ),
    )
