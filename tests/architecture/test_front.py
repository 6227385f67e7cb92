"""The public names, and a front that answers without loading torch."""

import subprocess
import sys

import pytest

import bigsimclr
from tests.architecture.tree import ROOT

PUBLIC = [
    "LARS",
    "BigSimCLRError",
    "ProjectionHead",
    "ResNet",
    "SimCLR",
    "World",
    "__version__",
    "distillation",
    "embed",
    "export",
    "import_tf",
    "load_model",
    "load_recipe",
    "nt_xent",
    "parameter_groups",
    "run_recipe",
    "warmup_cosine",
]

COMMANDS = {
    "import": "import bigsimclr, bigsimclr.recipe, bigsimclr.data, bigsimclr.errors",
    "import the command line": "import bigsimclr.cli",
    "--help": "",
    "--version": "",
    "run --help": "",
    "check digits": "",
    "check digits/1_pretrain --json": "",
    "explain loss.temperature": "",
    "recipes ls": "",
    "schema": "",
    "submit --help": "",
    "srun --help": "",
    "runs --help": "",
    "cancel --help": "",
    "logs --help": "",
    "doctor --help": "",
    "submit digits/1_pretrain --on slurm/cpu.yaml --dry-run": "",
    "submit digits --on h100_x8 --dry-run": "",
    "runs tests": "",
}


def test_public_names_are_these() -> None:
    assert bigsimclr.__all__ == PUBLIC
    assert dir(bigsimclr) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str) -> None:
    found = getattr(bigsimclr, name)
    assert found
    if name != "__version__":
        assert found.__name__ == name
        assert found.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nt_xnet'"):
        _ = bigsimclr.nt_xnet  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", COMMANDS)
def test_torch_stays_unloaded(words: str) -> None:
    run = f"sys.argv[1:] = {words.split()!r}; from bigsimclr.cli import main; main()"
    code = f"""
import sys
try:
    {COMMANDS[words] or run}
except SystemExit as end:
    assert end.code in (None, 0), end.code
heavy = sorted({{"torch", "scipy", "sklearn", "matplotlib", "pyarrow"}} & sys.modules.keys())
assert not heavy, heavy
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
