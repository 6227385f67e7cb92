"""What `bigsimclr doctor` says, and that it notices ranks which compute something else."""

import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bigsimclr.cli import app
from bigsimclr.doctor import EXTRAS, compare, compute, describe
from bigsimclr.errors import DistributedError
from bigsimclr.world import ALONE, World
from tests.architecture.tree import ROOT

PAIR = World(0, 2, torch.device("cpu"))  # for words only


def test_the_machine_is_described(tmp_path: Path) -> None:
    words = dict(re.split(r" {2,}", line, maxsplit=1) for line in describe(tmp_path).splitlines())
    assert words["torch"].startswith(torch.__version__)
    assert words["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert re.fullmatch(r"\d+ cores, \d+ threads of arithmetic", words["cpu"])
    assert re.fullmatch(r"[\d.]+ of [\d.]+ GiB free, .*", words["disk"])
    assert words["disk"].endswith(str(tmp_path))
    named = {extra for extra in EXTRAS if extra in words["extras"] + words.get("not installed", "")}
    assert named == EXTRAS.keys()


def test_the_command_prints_it() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.startswith("bigsimclr ")


def test_every_extra_is_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        extra: tuple(re.match(r"[\w-]+", line)[0] for line in lines)
        for extra, lines in project["optional-dependencies"].items()
        if extra != "dev"
    }
    assert declared == EXTRAS


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["apex/__init__.py"], "not NVIDIA's but PyPI's apex"),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], "NVIDIA's, without its kernels"),
        (
            ["apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"],
            "NVIDIA's, with its kernels",
        ),
    ],
)
def test_what_calls_itself_apex_is_told_apart_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], says: str
) -> None:
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (line,) = [line for line in describe(tmp_path).splitlines() if line.startswith("apex")]
    assert line.partition(" ")[2].strip().startswith(says)


def test_equal_computations_agree_and_others_do_not() -> None:
    one = compute(ALONE, 2)
    assert re.fullmatch(
        r"dist  gloo x2: loss (\S+) = \1 \(1 process\), largest gradient difference 0e\+00  ok",
        compare(one, one, PAIR),
    )
    # A rank that saw only its own images, as where nothing is gathered.
    half = compute(ALONE, 1)
    for other in (
        half,
        replace(one, loss=one.loss * torch.nan),
        replace(one, loss=one.loss * (1 + 1e-9)),
        replace(one, gradients=(one.gradients[0] * (1 + 1e-6), *one.gradients[1:])),
    ):
        with pytest.raises(DistributedError, match="ranks do not compute what one process does"):
            compare(other, one, PAIR)


def test_every_weight_has_a_gradient() -> None:
    assert all(gradient.any() for gradient in compute(ALONE, 2).gradients)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_compared_with_one_process(ranks: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bigsimclr", "doctor", "--dist", str(ranks)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = re.fullmatch(
        rf"dist  gloo x{ranks}: loss (\S+) = \1 \(1 process\), "
        r"largest gradient difference (\S+)  ok\n",
        ended.stdout,
    )
    assert found is not None, ended.stdout
    assert float(found[2]) < 1e-12
