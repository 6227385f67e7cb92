"""Recipes by name and by file."""

from pathlib import Path

import pytest

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import find_recipe, list_recipes, run_name
from bigsimclr.recipe.names import recipes_folder


def test_names_find_files_that_exist() -> None:
    names = list_recipes()
    assert {"digits", "digits/1_pretrain", "cifar10/1_pretrain"} <= set(names)
    assert all(find_recipe(name).is_relative_to(recipes_folder()) for name in names)
    assert find_recipe("digits").name == "pipeline.yaml"
    assert find_recipe("digits/pipeline.yaml") == find_recipe("digits")
    assert find_recipe("digits/1_pretrain.yaml") == find_recipe("digits/1_pretrain")


def test_file_comes_before_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("stage: knn")
    assert find_recipe("digits") == Path("digits")


def test_folder_does_not_hide_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert find_recipe("digits").name == "pipeline.yaml"


def test_beside_another_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stage: knn")
    assert find_recipe("mine", beside=tmp_path) == tmp_path / "mine.yaml"
    assert find_recipe("mine.yaml", beside=tmp_path) == tmp_path / "mine.yaml"
    assert find_recipe("digits", beside=tmp_path) == find_recipe("digits")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'?"),
        ("digits/1_pretrian", "did you mean 'digits/1_pretrain'?"),
        ("zzzzzz", "list them with: bigsimclr recipes ls"),
        ("../recipes/digits", "no such file"),
        ("a\x1b[2Jb", r"a\x1b[2Jb: no such file"),
        ("", "a folder; name a recipe file"),
        ("n\0ul", "no such file"),
    ],
)
def test_unknown_name(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    assert message in str(caught.value)


def test_run_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for file in ("mine/pipeline.yaml", "mine/one.yaml"):
        (tmp_path / file).touch()
    assert run_name("digits") == "digits"
    assert run_name("digits/1_pretrain.yaml") == "digits/1_pretrain"
    assert run_name(tmp_path / "mine" / "pipeline.yaml") == "mine"
    assert run_name(tmp_path / "mine" / "one.yaml") == "one"


def test_a_name_too_long_for_a_file_is_no_recipe() -> None:
    for name in ("x" * 300, "\u540d" * 150, f"{'x' * 300}/y.yaml"):
        with pytest.raises(RecipeError, match="no such file and no recipe of that name"):
            find_recipe(name)
        assert run_name(name) == name.removesuffix(".yaml")
