"""Errors: their exit codes are the documented ones, and a missing extra is named."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bigsimclr import cli, errors
from bigsimclr.errors import BigSimCLRError
from tests.architecture.tree import PACKAGE, ROOT

ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, BigSimCLRError)
]
CODES = {error.exit_code for error in ERRORS} | {0, 130}

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{package}":
            raise ModuleNotFoundError("No module named '{package}'", name="{package}")
sys.meta_path.insert(0, Blocker())
sys.argv[1:] = {words!r}
from bigsimclr.cli import main
main()
"""


def test_every_error_is_documented() -> None:
    assert all(error.__doc__ for error in ERRORS)


def test_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("Exit codes:"))
    assert {int(code) for code in re.findall(r"(?:^|[ ,:])(\d+) ", line)} == CODES


def test_exit_codes_in_the_help_are_those_of_the_errors() -> None:
    text = cli.app.info.epilog or ""
    assert {int(code) for code in re.findall(r"(?:[ ,:])(\d+) ", text)} == CODES


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("pyarrow", "parquet", ["run", "cifar10/1_pretrain", "data.root={root}"]),
        ("tensorboard", "tensorboard", ["run", "digits/1_pretrain", "log.tensorboard=true"]),
    ],
)
def test_missing_extra_is_named(package: str, extra: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.parquet").touch()
    words = [*(word.format(root=tmp_path) for word in words), "--out", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(package=package, words=words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert f"pip install 'bigsimclr[{extra}]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_extras_in_messages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra
        for file in PACKAGE.rglob("*.py")
        for extra in re.findall(r"bigsimclr\[([\w-]+)\]", file.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= project["optional-dependencies"].keys()
