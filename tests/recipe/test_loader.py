"""Reading recipes: numbers, overrides, and recipes that are written and read back."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import (
    is_pipeline,
    list_recipes,
    load_recipe,
    parse_overrides,
    parse_recipe,
    recipe_text,
    save_recipe,
)
from bigsimclr.recipe.schema import FinetuneRecipe, PretrainRecipe
from bigsimclr.recipe.sections import Lars, NtXentLoss, QueueSection
from bigsimclr.recipe.sources import ArraysData, DigitsData, FolderData
from bigsimclr.recipe.yaml_tree import plain_scalar
from tests.recipe.samples import FINETUNE, PIPELINE, PRETRAIN


def _pretrain(text: str = PRETRAIN, **overrides: object) -> PretrainRecipe:
    recipe = parse_recipe(text, overrides={k.replace("__", "."): v for k, v in overrides.items()})
    assert isinstance(recipe, PretrainRecipe)
    return recipe


def _refusal(text: str, overrides: object = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml", overrides=overrides)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e+1", -5.0),
        ("+3", 3),
        ("-0", 0),
        ("0", 0),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("True", "True"),
        ("NULL", "NULL"),
        ("010", "010"),
        ("01.5", "01.5"),
        ("0x1F", "0x1F"),
        ("0o7", "0o7"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        (".", "."),
        ("-", "-"),
        ("~/data", "~/data"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, meaning: object) -> None:
    read = plain_scalar(text)
    assert read == meaning
    assert type(read) is type(meaning)


def test_defaults_and_values() -> None:
    recipe = _pretrain()
    assert recipe.optimizer == Lars(kind="lars", learning_rate=0.1)
    assert recipe.loss == NtXentLoss()
    assert recipe.data == DigitsData(kind="digits")
    assert recipe.schedule.epochs == 3.0
    assert isinstance(recipe.schedule.epochs, float)


def test_windows_line_ends_and_document_marks() -> None:
    text = "---\n" + PRETRAIN + "...\n"
    assert parse_recipe(text.replace("\n", "\r\n")) == parse_recipe(PRETRAIN)


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _pretrain().seed = 3


@pytest.mark.parametrize("text", [PRETRAIN, FINETUNE, PIPELINE])
def test_resolved_recipe_reads_back_equal(text: str, tmp_path: Path) -> None:
    recipe = parse_recipe(text)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe_text(recipe).startswith("stage: ")


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_reads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(recipe_text(recipe)) == recipe
    assert is_pipeline(name) == (recipe.stage == "pipeline")


# Whatever stands in a path must come back: numbers, dates, words of YAML 1.1, quotes.
_PRINTABLE = st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), max_size=30)


@settings(deadline=None)
@given(
    _PRINTABLE
    | st.sampled_from(
        ["1e5", "no", "010", "~", "null", "12:30", "é", "a: b", "#", "=", "<<", "INF", ".nan"]
    )
)
def test_any_text_reads_back_equal(text: str) -> None:
    recipe = parse_recipe(FINETUNE, overrides={"data.root": text, "data.train": text})
    assert isinstance(recipe, FinetuneRecipe)
    assert isinstance(recipe.data, FolderData)
    assert recipe.data.root == (Path.home() if text == "~" else Path(text))
    assert recipe.data.train == text
    assert parse_recipe(recipe_text(recipe)) == recipe


@settings(deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300))
def test_any_float_reads_back_equal(value: float) -> None:
    recipe = _pretrain(loss__temperature=value)
    again = parse_recipe(recipe_text(recipe))
    assert isinstance(again, PretrainRecipe)
    assert again.loss.temperature == value


def test_overrides_of_every_form() -> None:
    texts = ["schedule.epochs=5", "augment.crop_area=[0.2, 1]", "loss={temperature: 1e-1}"]
    recipe = parse_recipe(PRETRAIN, overrides=texts)
    mapping = {"schedule.epochs": 5, "augment.crop_area": (0.2, 1), "loss": {"temperature": 0.1}}
    assert parse_recipe(PRETRAIN, overrides=mapping) == recipe
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.augment.crop_area == (0.2, 1.0)
    assert recipe.loss.temperature == 0.1


def test_override_makes_sections_on_the_way() -> None:
    recipe = _pretrain(loss__queue__length=64)
    assert recipe.loss.queue == QueueSection(length=64)


def test_override_of_a_whole_section_and_then_a_key_of_it() -> None:
    recipe = parse_recipe(
        PRETRAIN, overrides=["data={kind: arrays, root: x.npz}", "data.root=y.npz"]
    )
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.data == ArraysData(kind="arrays", root=Path("y.npz"))


def test_override_of_a_list_item() -> None:
    assert _pretrain("stage: pretrain\n" + PRETRAIN.partition("\n")[2]).augment.crop_area[0] == 0.1
    recipe = parse_recipe(
        PRETRAIN.replace("16}", "16, crop_area: [0.1, 1]}"), overrides=["augment.crop_area.0=0.5"]
    )
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.augment.crop_area == (0.5, 1.0)


def test_override_supplies_a_missing_key() -> None:
    text = PRETRAIN.replace("{kind: digits}", "{kind: arrays}")
    recipe = parse_recipe(text, overrides=["data.root=/some/where.npz"])
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.data == ArraysData(kind="arrays", root=Path("/some/where.npz"))


def test_text_of_a_mapping_is_not_parsed() -> None:
    recipe = parse_recipe(FINETUNE, overrides={"data.train": "true", "data.held_out": "7"})
    assert isinstance(recipe, FinetuneRecipe)
    assert isinstance(recipe.data, FolderData)
    assert (recipe.data.train, recipe.data.held_out) == ("true", "7")


def test_empty_override_is_null() -> None:
    recipe = parse_recipe(FINETUNE, overrides=["data.held_out=x"])
    assert isinstance(recipe, FinetuneRecipe)
    assert isinstance(recipe.data, FolderData)
    assert recipe.data.held_out == "x"
    assert parse_recipe(recipe_text(recipe), overrides=["data.held_out="]) == parse_recipe(FINETUNE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperatur=1", "loss.temperatur: unknown key; did you mean 'temperature'?"),
        ("loss.temperature=-1", "loss.temperature: should be greater than 0, not -1"),
        ("loss.temperature=.nan", "loss.temperature: .nan is not a finite number; "),
        ("loss.temperature='1'", "loss.temperature: should be a number, not '1'; write it without"),
        ("data.root=/x", "data.root: unknown key for this kind; it belongs to arrays, folder, "),
        ("data.kind=folder", "data.kind: data.root: the required key is missing; the folder that"),
        ("data.rot=/x", "data.rot: unknown key; choose from kind, held_out_fraction, split_seed"),
        ("probe.linear=no", "probe.linear: should be true or false, not 'no'; write true or false"),
        ("loss=[1", "loss: a bracket is opened and never closed"),
        ("seed=*x", "seed: *x: aliases are not allowed; repeat the value"),
        ("seed=!!int 3", "seed: tag tag:yaml.org,2002:int is not allowed; remove it"),
        ("seed=1\x1b", "seed: control character U+001B; remove it"),
        ("loss.temperature", "'loss.temperature': write it as key=value"),
        ("=3", "'=3': write it as key=value"),
        ("loss..x=3", "'loss..x=3': write it as key=value"),
        ("loss={temperatur: 1}", "loss: loss.temperatur: unknown key; did you mean 'temperature'?"),
        ("los.temperature=1", "los.temperature: unknown key 'los'; did you mean 'loss'?"),
        ("batch.update=accumulated", "batch.update: accumulated is not offered for a contrastive"),
        ("optimizer.kind=adam", "optimizer.kind: no kind 'adam'; did you mean 'adamw'?"),
        ("optimizer.kind=3", "optimizer.kind: should be one of lars, sgd, adamw, not 3"),
        ("schedule.steps=3", "schedule.steps: the recipe sets epochs; add schedule.epochs=null"),
        ("schedule.epochs=", "schedule.epochs: give exactly one of epochs and steps"),
        ("lr=3", "lr: unknown key; did you mean 'optimizer.learning_rate'?"),
        ("optimizer.lr=3", "optimizer.lr: unknown key; did you mean 'learning_rate'?"),
        ("steps=3", "steps: unknown key; did you mean 'schedule.steps'?"),
        ("parent=x", "parent: unknown key for this stage; it belongs to linear, "),
        (
            "parallel.device=gpu",
            "parallel.device: should be 'auto', 'cpu' or 'cuda', not 'gpu'; did you mean 'cuda'?",
        ),
        ("seed.x=3", "seed.x: seed: should be a whole number, not a section"),
        (
            "batch.global_batch.x=3",
            "batch.global_batch.x: cannot be set: r.yaml:7 holds no section",
        ),
    ],
)
def test_bad_override_is_named(override: str, message: str) -> None:
    assert _refusal(PRETRAIN, [override]).startswith(f"override {message}")


def test_another_amount_of_labels_needs_the_first_one_dropped() -> None:
    message = "override labels.percent: the recipe sets per_class; add labels.per_class=null"
    assert _refusal(FINETUNE, ["labels.percent=1"]) == message
    recipe = parse_recipe(FINETUNE, overrides=["labels.percent=1", "labels.per_class=null"])
    assert isinstance(recipe, FinetuneRecipe)
    assert recipe.labels.percent == 1.0
    both = _refusal(PRETRAIN, ["schedule.steps=3", "schedule.epochs=2"])
    assert both == "override schedule.epochs: give exactly one of epochs and steps"


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = {"data.root": "~/images", "labels": {"list": "~/l.txt"}, "parent": "~user/x"}
    recipe = parse_recipe(FINETUNE, overrides=overrides)
    assert isinstance(recipe, FinetuneRecipe)
    assert isinstance(recipe.data, FolderData)
    assert recipe.data.root == tmp_path / "images"
    assert recipe.labels.list == tmp_path / "l.txt"
    assert recipe.parent == Path("~user/x")


def test_override_given_twice() -> None:
    assert _refusal(PRETRAIN, ["seed=1", "seed=2"]) == "override seed: is given twice; keep one"


def test_errors_of_overrides_come_with_those_of_the_file() -> None:
    lines = _refusal(PRETRAIN + "x: 1\n", ["seed=-1", "y"]).splitlines()
    assert lines[0] == "override 'y': write it as key=value"
    assert lines[1] == "override seed: should be greater than or equal to 0, not -1"
    assert lines[2].startswith("r.yaml:8: x: unknown key")
    assert lines[3] == "3 errors, nothing was started."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"x", {1, 2}])
def test_python_value_that_yaml_cannot_write(value: object) -> None:
    assert _refusal(PRETRAIN, {"seed": value}).startswith("override seed: ")


def test_overrides_as_one_text_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match="not one text"):
        parse_recipe(PRETRAIN, overrides="seed=3")


def test_parse_overrides_reads_yaml() -> None:
    read = parse_overrides(["a=1e-4", "b.c=[1, x]", "d=", "e=no", "f={g: 1}"])
    assert read == {"a": 1e-4, "b.c": [1, "x"], "d": None, "e": "no", "f": {"g": 1}}
    with pytest.raises(RecipeError, match="2 errors"):
        parse_overrides(["a", "b=[1"])


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file and no recipe of that name"):
        load_recipe(tmp_path / "none.yaml")
