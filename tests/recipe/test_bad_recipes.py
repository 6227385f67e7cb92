"""Every bad recipe is refused with its file and line, and says what is wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import load_recipe, parse_recipe
from tests.recipe.bad_recipes import BAD_RECIPES, BadRecipe
from tests.recipe.samples import PRETRAIN


def _write(folder: Path, text: str | bytes) -> Path:
    file = folder / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("bad", BAD_RECIPES, ids=[bad[0] for bad in BAD_RECIPES])
def test_refused_with_file_and_line(bad: BadRecipe, tmp_path: Path) -> None:
    _, text, line, fragment = bad
    file = _write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, "one mistake, one line"
    assert lines[0].startswith(f"{file}:{line}: "), lines[0]
    assert fragment in lines[0]
    assert caught.value.exit_code == 2
    assert lines[0].isprintable()
    assert len(lines[0]) < len(str(file)) + 400


def test_corpus_is_large_and_named_apart() -> None:
    names = [bad[0] for bad in BAD_RECIPES]
    assert len(set(names)) == len(names) >= 60


def test_all_mistakes_at_once_in_order_of_lines() -> None:
    text = PRETRAIN + "loss: {temperatur: 1}\nseed: 010\nbatch: 3\nhead: {layers: 0}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml")
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == [
        "r.yaml:8",
        "r.yaml:9",
        "r.yaml:10",
        "r.yaml:11",
    ]
    assert lines[-1] == "4 errors, nothing was started."


def test_thousands_of_mistakes_are_not_all_spelled_out() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(PRETRAIN + "".join(f"k{n}: {n}\n" for n in range(1000)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 52
    assert lines[-2:] == ["and 950 more", "1000 errors, nothing was started."]


def test_value_that_is_broken_already_is_not_reported_twice() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(PRETRAIN.replace("epochs: 3", "epochs: .nan"), name="r.yaml")
    assert str(caught.value) == "r.yaml:6: .nan is not a finite number; text would need quotes"


@settings(deadline=None)
@given(st.text(max_size=80) | st.text(alphabet="ab:{}[]-?!&*#|>'\"%@, \n01.e~<", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml")
    assert all(line.startswith("r.yaml:") for line in str(caught.value).splitlines()[:1])


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_line_added_to_a_recipe_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    file = _write(tmp_path_factory.mktemp("any"), PRETRAIN.encode() + tail)
    try:
        load_recipe(file)
    except RecipeError as error:
        refusal = str(error)
    else:
        refusal = f"{file}: none"
    assert refusal.startswith(f"{file}:")
