"""Every tensor that a public function takes says its shape where the reader looks for it."""

import ast
import re

import pytest

from tests.architecture.tree import functions, lines_of, sources

FILES = sorted(sources("augment", "losses", "models", "stages/embed.py"))
SHAPE = re.compile(r"\[[A-Za-z0-9_*+,. -]*\]")


def _public(name: str) -> bool:
    return all(not part.startswith("_") or part == "__call__" for part in name.split("."))


def _is_tensor(argument: ast.arg) -> bool:
    annotation = argument.annotation
    if isinstance(annotation, ast.Constant):
        annotation = ast.parse(str(annotation.value), mode="eval").body
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id == "Tensor" for node in ast.walk(annotation)
    )


def _undescribed(
    file: str, node: ast.FunctionDef | ast.AsyncFunctionDef
) -> tuple[list[str], list[str]]:
    """Return the tensor parameters, and those of them without a shape beside them."""
    documentation = ast.get_docstring(node) or ""
    lines = lines_of(file)
    taken = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    # `like` lends its device and type; its shape does not matter.
    tensors = [argument for argument in taken if _is_tensor(argument) and argument.arg != "like"]
    missing = []
    for argument in tensors:
        comment = lines[argument.lineno - 1].partition("#")[2]
        entry = re.search(rf"^ *{argument.arg}: (.*(?:\n {{4,}}.*)*)", documentation, re.MULTILINE)
        if not SHAPE.search(comment) and not (entry and SHAPE.search(entry[1])):
            missing.append(argument.arg)
    return [argument.arg for argument in tensors], missing


@pytest.mark.parametrize("file", FILES)
def test_tensor_parameters_have_shapes(file: str) -> None:
    for name, node in functions(sources()[file]):
        if not _public(name):
            continue
        tensors, missing = _undescribed(file, node)
        # A docstring of one sentence may name the shapes of all parameters in their order.
        sentence = (ast.get_docstring(node) or "").partition("\n")[0]
        if len(SHAPE.findall(sentence)) >= len(tensors):
            continue
        assert not missing, f"bigsimclr/{file}:{node.lineno}: {name} says no shape of {missing}"
