"""The wheel holds all that the package reads at run time, and works away from the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation, since an isolated build would download its tools.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (built,) = folder.glob("bigsimclr-*.whl")
    return built


@pytest.mark.slow
def test_wheel_is_complete_and_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = {
        f"bigsimclr/recipes/{file.relative_to(ROOT / 'recipes').as_posix()}"
        for file in (ROOT / "recipes").rglob("*.yaml")
    }
    assert recipes <= names
    profiles = {f"bigsimclr/slurm/{file.name}" for file in (ROOT / "slurm").iterdir()}
    assert {"bigsimclr/slurm/cpu.yaml", "bigsimclr/slurm/train.sbatch"} <= profiles
    assert profiles <= names
    assert {"bigsimclr/py.typed", "bigsimclr/report/report.html.j2"} <= names
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "bigsimclr").rglob("*.py")}
    assert modules <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"bigsimclr"}


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    ended = subprocess.run(
        [sys.executable, "-m", "bigsimclr", "check", "digits"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "pretrain" in ended.stdout


@pytest.mark.slow
def test_shipped_profiles_are_found_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    words = ["submit", "digits/1_pretrain", "--on", "slurm/h100_x8.yaml", "--dry-run"]
    ended = subprocess.run(
        [sys.executable, "-m", "bigsimclr", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --gpus-per-node=8" in ended.stdout.splitlines()
