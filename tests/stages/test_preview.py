import base64
import io
import re
from pathlib import Path

import html5lib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bigsimclr.cli import app
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import RecipeError
from bigsimclr.report.preview import PreviewRow, Shown, preview_page
from bigsimclr.stages.inputs import open_inputs
from bigsimclr.stages.preview import examples, sheet
from bigsimclr.world import ALONE
from tests.stages.tiny import DISTILL, FINETUNE, KNN, PRETRAIN, recipe_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        path = tmp_path / f"photos/{'xy'[number % 2]}/<b>{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


def keys(photos: Path) -> tuple[str, ...]:
    # Tiny recipes read digits; these read a folder instead, whose images differ in size.
    return (f"data={{kind: folder, root: '{photos}'}}", "augment.image_size=16")


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_views_are_those_of_training(photos: Path, source: str) -> None:
    changes = keys(photos) if source == "folder" else ()
    recipe = recipe_of(PRETRAIN, "batch.global_batch=8", *changes)
    shown = examples(recipe, 5)
    inputs = open_inputs(recipe, labels=None, walk="all", world=ALONE, stop=StopRequest())
    batch = next(iter(inputs.loader(recipe, views=2).batches(0, 3)))
    views = inputs.views(batch).unflatten(0, (2, 8)).permute(1, 0, 3, 4, 2)
    pixels = (views * 255).round().byte().numpy()
    assert len(shown) == 5
    for row, example in enumerate(shown):
        index = int(batch.indices[row])
        assert example.name == inputs.train.name(index)
        assert example.class_name == inputs.classes[int(batch.labels[row])]
        assert np.array_equal(example.views, pixels[row])
        assert np.array_equal(example.boxes, batch.draws.boxes[:, row])
        stored = inputs.train.read(index).image
        original = stored if source == "digits" else np.asarray(Image.open(io.BytesIO(stored)))
        assert np.array_equal(example.original, original)


def test_stages_show_what_they_walk_through() -> None:
    tuned = examples(recipe_of(FINETUNE, "parent=none"), 100)
    assert len(tuned) == 20
    assert {example.views.shape for example in tuned} == {(1, 8, 8, 3)}
    assert len({example.class_name for example in tuned}) == 10
    assert len(examples(recipe_of(DISTILL, "parent=none"), 100)) == 100
    with pytest.raises(RecipeError, match="knn stage trains nothing"):
        examples(recipe_of(KNN, "parent=none"), 1)


def test_what_was_drawn_is_said() -> None:
    shown = examples(recipe_of(PRETRAIN, "augment.blur_probability=1.0"), 40)
    words = [text for example in shown for text in example.words]
    assert all(re.match(r"crop \d+ x \d+ at \(\d+, \d+\)", text) for text in words)
    assert all(re.search(r"blur [0-2]\.\d px$", text) for text in words)
    assert sum("grey" in text for text in words) in range(4, 40)
    assert any(re.search(r"hue [+-]0\.\d\d", text) for text in words)
    assert {example.views.shape[0] for example in shown} == {2}


def test_the_sheet_holds_each_view_whole() -> None:
    shown = examples(recipe_of(PRETRAIN), 3)
    picture = sheet(shown)
    # Views of 8 pixels are shown with 12 for each, in frames of 2 and at distances of 8.
    assert picture.shape == (8 + 3 * 108, 8 + 3 * 108, 3)
    for row, example in enumerate(shown):
        for view in range(2):
            y, x = 10 + row * 108, 10 + (view + 1) * 108
            cell = picture[y : y + 96, x : x + 96]
            assert np.array_equal(cell[6::12, 6::12], example.views[view])


def invoke(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "preview", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "new/sheet.png"
    code, text, _ = invoke("digits/1_pretrain", "-o", str(out), "--images", "2")
    assert (code, text) == (0, f"{out}: views of 2 images\n")
    with Image.open(out) as picture:
        assert picture.size == (8 + 3 * 108, 8 + 2 * 108)
    first = out.read_bytes()
    assert invoke("digits", "-o", str(out), "--images", "2")[0] == 0
    assert out.read_bytes() == first
    assert invoke("digits/1_pretrain", "seed=1", "-o", str(out), "--images", "2")[0] == 0
    assert out.read_bytes() != first
    code, _, told = invoke("digits", "-o", str(tmp_path / "x.jpg"))
    assert code == 2
    assert told.endswith("x.jpg must end in .png or .html\n")


def test_the_command_writes_a_page_that_loads_nothing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    where = ["data.kind=folder", f"data.root={photos}", "augment.image_size=16"]
    code, _, told = invoke("digits/1_pretrain", *where, "-o", str(out), "--images", "3")
    assert code == 0, told
    text = out.read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert "<b>" not in text
    assert text.count("&lt;b&gt;") == 3 * 4  # alt texts of three pictures, and the caption
    document = html5lib.parse(text, namespaceHTMLElements=False)
    assert document.find(".//script") is None
    sources = [image.get("src") for image in document.iter("img")]
    assert len(sources) == 9
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == "PNG"


def test_a_pipeline_whose_steps_read_different_images_shows_its_first(
    tmp_path: Path,
) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        "stage: pipeline\nsteps:\n  - {name: one, recipe: digits/1_pretrain}\n"
        "  - {name: two, recipe: digits/4_supervised, changes: {data.held_out_fraction: 0.3}}\n"
    )
    code, _, told = invoke(str(file), "-o", str(tmp_path / "views.png"), "--images", "1")
    assert code == 0, told
    result = CliRunner().invoke(app, ["data", "scan", str(file)])
    assert result.exit_code == 2
    assert "a pipeline whose steps 'one' and 'two' read different images" in result.stderr


def test_the_decoder_that_training_orders_is_not_needed(photos: Path) -> None:
    shown = examples(recipe_of(PRETRAIN, *keys(photos), "input.decoder=dali"), 2)
    plain = examples(recipe_of(PRETRAIN, *keys(photos), "input.decoder=pillow"), 2)
    for one, other in zip(shown, plain, strict=True):
        assert np.array_equal(one.views, other.views)


def test_pages_escape_whatever_they_are_given() -> None:
    evil = '"><script>alert(1)</script>\x1b[31m\u202e'
    shown = Shown(b"", evil)
    text = preview_page(evil, [PreviewRow(shown, (shown,))])
    document = html5lib.parse(text, namespaceHTMLElements=False)
    assert document.find(".//script") is None
    assert not {"\x1b", "\u202e"} & set(text)
