"""The command line as a user meets it: output, exit codes, no tracebacks, no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from bigsimclr.cli import app
from bigsimclr.recipe import list_recipes
from tests.recipe.bad_recipes import BAD_RECIPES, BadRecipe
from tests.recipe.samples import FINETUNE, PIPELINE, PRETRAIN

SPAWNED = ("two documents", "alias bomb", "too deep", "octal", "unknown key", "UTF-16")


def _name(bad: BadRecipe) -> str:
    return bad[0]


def _spawn(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigsimclr", *words], capture_output=True, text=True, check=False
    )


def _invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def _recipe(folder: Path, text: str = PRETRAIN) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("bad", [bad for bad in BAD_RECIPES if bad[0] in SPAWNED], ids=_name)
def test_bad_recipe_in_a_process_of_its_own(bad: BadRecipe, tmp_path: Path) -> None:
    _, text, line, fragment = bad
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    ended = _spawn("check", str(file))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"bigsimclr: error: {file}:{line}: ")
    assert fragment in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("bad", BAD_RECIPES[::3], ids=_name)
def test_bad_recipe_is_not_run(bad: BadRecipe, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(bad[1] if isinstance(bad[1], bytes) else bad[1].encode())
    result = _invoke("run", str(file), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"bigsimclr: error: {file}:{bad[2]}: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["recipes", "ls"],
        ["check", "digits"],
        ["check", "digits/1_pretrain"],
        ["explain", "loss.temperature"],
        ["schema"],
    ],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(words: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bigsimclr", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "bigsimclr.cli" in imported
    heavy = ("torch", "sklearn", "scipy", "matplotlib", "pandas", "PIL", "rich", "jinja2")
    assert not imported & set(heavy)


def test_check_prints_the_resolved_recipe_and_the_plan(tmp_path: Path) -> None:
    result = _invoke("check", _recipe(tmp_path), "schedule.epochs=2")
    assert result.exit_code == 0
    assert "schedule: {epochs: 2.0, steps: null, warmup_epochs: 0.0}" in result.stdout
    assert "1,437 training images, 360 held out" in result.stdout


def test_check_as_json_for_several_ranks(tmp_path: Path) -> None:
    result = _invoke("check", _recipe(tmp_path), "--json", "--world-size", "4")
    (facts,) = json.loads(result.stdout)
    assert facts["stage"] == "pretrain"
    assert facts["recipe"]["loss"]["temperature"] == 0.1
    assert facts["plan"]["batch"].startswith("64 = 4 ranks x 16;")
    (alone,) = json.loads(_invoke("check", _recipe(tmp_path), "--json").stdout)
    assert alone["plan"]["batch"].startswith("64 = 1 rank x 64;")


def test_check_says_that_a_parent_is_needed() -> None:
    row = "parent         not given; needed to run: parent=DIR"
    assert row in _invoke("check", "digits/5_finetune").stdout.splitlines()
    assert "not given" not in _invoke("check", "digits/5_finetune", "parent=x").stdout
    assert "not given" not in _invoke("check", "digits/4_supervised").stdout


def test_check_of_a_pipeline_with_a_step_that_lacks_its_parent(tmp_path: Path) -> None:
    steps = "  - {name: a, recipe: digits/1_pretrain}\n  - {name: b, recipe: digits/5_finetune}\n"
    file = _recipe(tmp_path, f"stage: pipeline\nsteps:\n{steps}")
    for command in ("check", "run"):
        result = _invoke(command, file)
        assert result.exit_code == 2
        line = f"{file}:4: step 'b' (finetune) needs parent: NAME of an earlier step"
        line += ", or b.parent=RUN for one that exists"
        assert result.stderr == f"bigsimclr: error: {line}\n"


def test_check_without_the_data(tmp_path: Path) -> None:
    result = _invoke("check", _recipe(tmp_path, FINETUNE), f"data.root={tmp_path / 'none'}")
    assert result.exit_code == 0
    assert re.search(r"(?m)^data +not counted: data\.root: .* does not exist", result.stdout)


def test_check_plans_for_a_given_number_of_images() -> None:
    words = ["check", "imagenet/1_pretrain", "backbone.selective_kernel=true"]
    lines = _invoke(*words, "--examples", "1281167", "--world-size", "32").stdout.splitlines()
    rows = dict(line.split("  ", 1) for line in lines if re.match(r"[a-z ]+  ", line))
    assert rows["data"].strip().startswith("1,281,167 training images, as given; data.root: ")
    assert rows["steps"].strip().startswith("250,228 updates of 4,096 images (800.0 epochs), ")
    assert rows["batch"].strip().startswith("4,096 = 32 ranks x 128; micro-batch 128, update dir")
    assert rows["learning rate"].strip() == "6.4 (lars, 0.1, scaling sqrt), then cosine to 0"
    assert "35.3 M with batch norm's statistics" in rows["parameters"]
    assert " GFLOP forward per view, x 3 " in rows["compute"]
    assert rows["memory"].strip().startswith("activations ")

    (facts,) = json.loads(_invoke(*words, "--examples", "4096", "--json").stdout)
    assert facts["plan"]["steps"].startswith("801 updates")
    assert facts["cost"]["total_flops"] == 801 * facts["cost"]["update_flops"]
    refused = _invoke(*words, "--examples", "0")
    assert (refused.exit_code, refused.stdout) == (2, "")
    few = _invoke(*words, "--examples", "4095")
    assert few.exit_code == 2
    assert "4095 images cannot fill a batch of 4096" in few.stderr


def test_check_of_a_pipeline_plans_every_step_for_a_given_number() -> None:
    lines = _invoke("check", "imagenet", "--examples", "1281167").stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "pretrain",
        "finetune",
        "distill_self",
        "distill_small",
    ]
    # The official list of labelled images is not here either.
    assert "steps are not known: labels.list: data/imagenet/1percent.txt does not" in lines[1]
    steps = re.compile(r"; ([\d,]+) updates of 4,096 images \((\d+)\.0 epochs\), ")
    found = [steps.search(line) for line in (lines[0], *lines[2:])]
    assert [match and match.groups() for match in found] == [
        ("250,228", "800"),
        ("125,114", "400"),
        ("125,114", "400"),
    ]


def test_check_of_every_recipe_that_ships_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list_recipes():
        result = _invoke("check", name)
        assert (result.exit_code, result.stderr) == (0, ""), name
        assert re.search(r"training images|--examples N to plan for N images", result.stdout), name


def test_check_of_a_pipeline_counts_labelled_images(tmp_path: Path) -> None:
    digits = FINETUNE.replace("{kind: folder, root: images}", "{kind: digits}")
    (tmp_path / "one.yaml").write_text(PRETRAIN)
    (tmp_path / "two.yaml").write_text(digits)
    result = _invoke("check", _recipe(tmp_path, PIPELINE))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "pretrain",
        "finetune/per_class=1",
        "finetune/per_class=2",
    ]
    assert "20 training images" in lines[2]
    assert lines[0].startswith("pretrain: 1,437 training images"), "the stage is said once"


def test_check_of_a_pipeline_names_stages_that_steps_do_not(tmp_path: Path) -> None:
    steps = "steps:\n  - {name: a, recipe: digits/1_pretrain}\n"
    result = _invoke("check", _recipe(tmp_path, f"stage: pipeline\n{steps}"))
    assert result.stdout.startswith("a: pretrain; 1,437 training images")


def test_check_of_a_batch_that_ranks_cannot_share(tmp_path: Path) -> None:
    result = _invoke("check", _recipe(tmp_path), "--world-size", "3")
    assert result.exit_code == 2
    assert "64 is not a multiple of 3 ranks" in result.stderr


def test_recipes_ls_and_cat() -> None:
    listed = _invoke("recipes", "ls")
    assert any(line.startswith("digits/1_pretrain ") for line in listed.stdout.splitlines())
    shown = _invoke("recipes", "cat", "digits")
    assert "stage: pipeline" in shown.stdout


def test_recipes_cp_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    assert _invoke("recipes", "cp", "digits/1_pretrain", str(file)).exit_code == 0
    copied = file.read_text()
    again = _invoke("recipes", "cp", "digits", str(file))
    assert again.exit_code == 7
    assert again.stderr == f"bigsimclr: error: {file} exists already; choose another name\n"
    assert file.read_text() == copied
    assert _invoke("check", str(file)).exit_code == 0


def test_recipes_cp_makes_folders_and_says_what_it_wrote(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "dir" / "mine.yaml"
    result = _invoke("recipes", "cp", "digits", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: a copy of digits\n")
    assert _invoke("check", str(file)).stdout == _invoke("check", "digits").stdout
    below = _invoke("recipes", "cp", "digits", str(file / "x.yaml"))
    assert below.exit_code == 7
    assert below.stderr == f"bigsimclr: error: {file} is a file, not a folder\n"


def test_lists_fit_a_terminal() -> None:
    for words in (["recipes", "ls"], ["--help"], ["data", "--help"], ["recipes", "--help"]):
        lines = _invoke(*words).stdout.splitlines()
        assert all(len(line) <= 80 for line in lines), words
        assert not [line for line in lines[1:] if line.endswith("...")], words


def test_explain() -> None:
    assert "default 0.1" in _invoke("explain", "loss.temperature").stdout
    wrong = _invoke("explain", "loss.temperatur")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.endswith("did you mean 'loss.temperature'?\n")
    assert _invoke("explain").exit_code == 2
    assert _invoke("explain", "--all", "--markdown").stdout.startswith("# Recipe keys\n")


def test_schema_is_json() -> None:
    assert "$defs" in json.loads(_invoke("schema").stdout)


def test_data_split_writes_a_list_once(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    words = ["data", "split", _recipe(tmp_path), "--per-class", "2", "--out", str(file)]
    result = _invoke(*words)
    assert result.exit_code == 0, result.stderr
    names = file.read_text().splitlines()
    assert len(set(names)) == 20
    assert "20 of 1437 images, sha256 " in result.stdout
    assert _invoke(*words).exit_code == 7
    more = tmp_path / "more.txt"
    _invoke("data", "split", _recipe(tmp_path), "--per-class", "5", "-o", str(more))
    assert set(names) < set(more.read_text().splitlines())


@pytest.mark.parametrize(
    "words", [[], ["--per-class", "1", "--percent", "1"], ["--percent", "0"]], ids=str
)
def test_data_split_needs_one_amount(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    result = _invoke("data", "split", _recipe(tmp_path), *words, "-o", str(file))
    assert result.exit_code == 2
    assert not file.exists()


def test_usage_errors_exit_with_2() -> None:
    for words in (["nonsense"], ["run"], ["check", "digits", "--world-size", "0"], ["--nonsense"]):
        ended = _invoke(*words)
        assert ended.exit_code == 2, words
        assert "Traceback" not in ended.stderr


def test_version_and_module() -> None:
    ended = _spawn("--version")
    assert ended.returncode == 0
    assert ended.stdout.startswith("bigsimclr 0.")


@pytest.mark.slow
def test_verbose_says_what_was_taken(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    words = ["run", "digits/1_pretrain", "data.kind=folder", f"data.root={tmp_path / 'photos'}"]
    words += ["data.labelled=false", "batch.global_batch=8", "schedule.epochs=1"]
    words += ["schedule.warmup_epochs=0", "input.decoder=pillow", "parallel.device=cpu", "--quiet"]
    plain = _spawn(*words, "--out", str(tmp_path / "plain"))
    verbose = _spawn(*words, "--out", str(tmp_path / "verbose"), "--verbose")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert verbose.returncode == 0
    lines = verbose.stderr.splitlines()
    assert {"device: cpu", "decoder: Pillow, as ordered", "kernels: plain PyTorch"} <= set(lines)


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    plain, first, last = (
        _spawn("check", "nosuch"),
        _spawn("--debug", "check", "nosuch"),
        _spawn("check", "nosuch", "--debug"),
    )
    assert [ended.returncode for ended in (plain, first, last)] == [2, 2, 2]
    assert "Traceback" not in plain.stderr
    assert "Traceback" in first.stderr
    assert "Traceback" in last.stderr
    assert last.stderr.endswith(plain.stderr)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("KeyError('x')", 1, "error: unexpected KeyError: 'x'; run again with --debug"),
        ("KeyboardInterrupt()", 130, "interrupted"),
        ("errors.Stopped('saved')", 75, "stopped: saved"),
        ("errors.DataError('x')", 3, "error: x"),
        ("errors.CheckpointError('x')", 4, "error: x"),
        ("errors.NumericsError('x')", 5, "error: x"),
    ],
)
def test_exit_codes(raised: str, code: int, line: str) -> None:
    program = f"""
import sys
import bigsimclr.recipe
from bigsimclr import errors
from bigsimclr.cli import main
def fail(name):
    raise {raised}
bigsimclr.recipe.find_recipe = fail
sys.argv[1:] = ["recipes", "cat", "x"]
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr == f"bigsimclr: {line}\n"


def test_report_of_what_is_no_run_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    result = _invoke("report", str(tmp_path))
    assert result.exit_code == 4
    why = "is not a run directory (no recipe.yaml or pipeline.yaml)"
    assert result.stderr == f"bigsimclr: error: {tmp_path} {why}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    missing = _invoke("report", str(tmp_path / "none"))
    assert missing.exit_code == 4
    assert missing.stderr == f"bigsimclr: error: {tmp_path / 'none'} is no folder\n"


def test_predictions_go_to_a_csv_file_only(tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    result = _invoke("predict", str(tmp_path), str(tmp_path), "-o", str(out))
    assert result.exit_code == 2
    assert ".csv" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("module", ["typer", "pydantic"])  # pydantic comes while words are parsed
def test_interrupt_while_the_command_is_loaded(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt\n")
    for program in ("-m bigsimclr", "-c from bigsimclr.__main__ import main; main()"):
        ended = subprocess.run(
            [sys.executable, *program.split(" ", 1), "check", "digits"],
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (130, "bigsimclr: interrupted\n")


def test_data_pack_and_index_lay_images_out(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / f"set/{number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff" * number)
    words = ["data", "pack", str(tmp_path / "set"), "--out", str(tmp_path / "pack")]
    result = _invoke(*words)
    assert result.exit_code == 0, result.stderr
    sizes = sum(path.stat().st_size for path in (tmp_path / "pack").glob("*.tar"))
    assert result.stdout == f"{tmp_path / 'pack'}: 6 images in 1 shard, {sizes:,} bytes, verified\n"
    again = _invoke(*words, "--in-order")
    assert again.exit_code == 7
    assert "holds a pack cut otherwise" in again.stderr
    manifest = tmp_path / "list.json"
    listed = _invoke("data", "index", str(tmp_path / "set"), "-o", str(manifest))
    assert listed.stdout == f"{manifest}: 6 images, 45 bytes\n"
    for data in (
        f"{{kind: shards, root: {tmp_path / 'pack'}}}",
        f"{{kind: folder, root: {tmp_path / 'set'}, manifest: {manifest}}}",
    ):
        checked = _invoke("check", _recipe(tmp_path), f"data={data}", "batch.global_batch=2")
        assert checked.exit_code == 0, checked.stderr
        assert re.search(r"^data +6 training images", checked.stdout, re.MULTILINE), checked.stdout
    missing = _invoke("data", "pack", str(tmp_path / "none"), "-o", str(tmp_path / "x"))
    assert missing.exit_code == 3
    assert missing.stderr.startswith(f"bigsimclr: error: {tmp_path / 'none'} does not exist")
    none = _invoke("data", "index", str(tmp_path / "none"), "-o", str(tmp_path / "x"))
    assert none.exit_code == 3
