"""Errors: their exit codes are the documented ones, and a missing extra is named."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocker())
{code}
"""


def _blocked(package: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(package=package, code=code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_error_is_documented() -> None:
    assert all(error.__doc__ for error in ERRORS)


def test_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = (part for part in text.split("\n\n") if part.startswith("Exit codes:"))
    assert {int(code) for code in re.findall(r"(?<=\s)(\d+)(?=\s)", listed)} == CODES


def test_exit_codes_in_the_help_are_those_of_the_errors() -> None:
    text = cli.app.info.epilog or ""
    assert {int(code) for code in re.findall(r"(?<=\s)(\d+)(?=[\s,:])", text)} == CODES


def test_missing_extra_ends_the_command_line_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").touch()
    words = ["check", "cifar10/1_pretrain", f"data.root={tmp_path}"]
    ended = _blocked("pyarrow", f"sys.argv[1:] = {words!r}; from bigsimclr.cli import main; main()")
    assert ended.returncode == 2, ended.stderr
    assert "pip install 'bigsimclr[parquet]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_tensorboard_is_named(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from bigsimclr.errors import MissingExtraError
from bigsimclr.report.records import Records
try:
    Records(Path({str(tmp_path)!r}), tensorboard=True)
except MissingExtraError as error:
    print(error)
"""
    ended = _blocked("tensorboard", code)
    assert "pip install 'bigsimclr[tensorboard]'" in ended.stdout, ended.stderr


def test_extras_in_messages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra
        for file in PACKAGE.rglob("*.py")
        for extra in re.findall(r"bigsimclr\[([\w-]+)\]", file.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= project["optional-dependencies"].keys()
