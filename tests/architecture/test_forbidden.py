"""What the package never does, found in its syntax tree rather than in its text."""

import ast

import pytest

from tests.architecture.tree import dotted, imported, sources

# Each can run code that came with data, or a command line that came with data.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "np.random.seed",
    "torch.manual_seed",
    "random.seed",
}
ENVIRONMENT = {"os.environ", "os.getenv", "os.putenv", "os.environb"}
READS_ENVIRONMENT = ("world.py", "launch/")
OPTIONAL_PARTS = {"torch.utils.tensorboard": "report/records.py", "torch.distributed": "world.py"}


@pytest.mark.parametrize("name", sources())
def test_nothing_is_unpickled(name: str) -> None:
    found = {module.partition(".")[0] for module in imported(sources()[name])}
    assert not found & MODULES


@pytest.mark.parametrize("name", sources())
def test_no_text_is_run_as_code(name: str) -> None:
    for node in ast.walk(sources()[name]):
        if not isinstance(node, ast.Call):
            continue
        assert dotted(node.func) not in CALLS, f"{name}:{node.lineno}"
        for argument in node.keywords:
            true = isinstance(argument.value, ast.Constant) and argument.value.value is True
            assert not (argument.arg in ("shell", "allow_pickle") and true), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", sources())
def test_the_environment_is_read_in_one_place(name: str) -> None:
    if name.startswith(READS_ENVIRONMENT):
        return
    tree = sources()[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert dotted(node) not in ENVIRONMENT, f"{name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, name


@pytest.mark.parametrize("name", sources())
def test_parts_of_torch_that_move_have_one_door(name: str) -> None:
    tree = sources()[name]
    used = imported(tree) | {dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for part, door in OPTIONAL_PARTS.items():
        if any(module == part or module.startswith(f"{part}.") for module in used):
            apart = part == "torch.distributed" and name.startswith(("parallel/", "launch/"))
            assert name == door or apart


@pytest.mark.parametrize("name", sources())
def test_no_module_is_a_drawer_for_everything(name: str) -> None:
    stem = name.rpartition("/")[2].removesuffix(".py")
    assert stem not in {"utils", "util", "helpers", "helper", "misc", "common", "base", "manager"}
