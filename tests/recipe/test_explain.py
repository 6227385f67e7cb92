"""What keys mean: every key has words, and the page of all keys is the schema's."""

import pytest

from bigsimclr.errors import RecipeError
from bigsimclr.recipe import explain, recipe_schema
from bigsimclr.recipe.explain import all_keys, explain_all


def test_a_key_with_range_default_and_stages() -> None:
    text = explain("loss.temperature")
    assert text.splitlines()[0] == "loss.temperature: number > 0; default 0.1"
    assert "cosine similarities" in text
    assert text.endswith("stages: pretrain")


def test_a_key_of_several_kinds() -> None:
    text = explain("optimizer.learning_rate")
    assert text.count("number > 0; required") == 3
    assert "with optimizer.kind: lars" in text


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("backbone.depth", "backbone.depth: 10 or 18 or 34 or 50 or 101 or 152 or 200; required"),
        ("labels.percent", "labels.percent: number > 0 and <= 100 or null; default null"),
        ("augment.resize", "augment.resize: tf2 or tf1; default tf2"),
        (
            "data",
            "data: section, kind: digits or arrays or folder or parquet or shards or mix; required",
        ),
        ("data.root", "data.root: path; required"),
        ("steps.name", "steps.name: text; required"),
        ("loss.queue.length", "loss.queue.length: whole number > 0; default 65536"),
        ("probe.linear", "probe.linear: true or false; default true"),
    ],
)
def test_first_line(key: str, first: str) -> None:
    assert explain(key).splitlines()[0] == first


def test_a_section_lists_its_keys() -> None:
    assert "  loss.queue.ema_decay" in explain("loss.queue").splitlines()


def test_what_an_arrays_file_holds_and_where_it_is_looked_for() -> None:
    text = explain("data.root")
    for part in ("`images`, uint8 [N,H,W,3]", "`labels`, whole numbers [N]", "-1 for none"):
        assert part in text
    assert text.count("relative to the current directory") == 4


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("loss.temperatur", "did you mean 'loss.temperature'?"),
        ("tau.queue", "did you mean 'loss.queue'?"),
        ("lr", "did you mean 'optimizer.learning_rate'?"),
        ("qqqq", "all keys: bigsimclr explain --all"),
    ],
)
def test_unknown_key(key: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        explain(key)
    assert message in str(caught.value)


def test_every_key_is_documented() -> None:
    keys = all_keys()
    assert len({facts.key for facts in keys}) > 60
    assert [facts.key for facts in keys if not facts.text.endswith((".", ")"))] == []


def test_both_forms_name_every_key() -> None:
    plain, page = explain_all(), explain_all(markdown=True)
    for facts in all_keys():
        assert f"{facts.key}: " in plain
        assert facts.key == "stage" or f"| `{facts.key.rpartition('.')[2]}` |" in page


def test_schema_knows_stages_and_descriptions() -> None:
    schema = recipe_schema()
    assert schema["$schema"]
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    temperature = definitions["NtXentLoss"]["properties"]["temperature"]
    assert temperature["exclusiveMinimum"] == 0
    assert "cosine" in temperature["description"]
