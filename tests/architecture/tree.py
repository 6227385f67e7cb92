"""The repository as data: its files, and the package's source parsed once."""

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bigsimclr"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

# What is made, not written: never part of a checkout.
_MADE = {".git", "runs", "build", "dist", "__pycache__", ".venv"}


@cache
def sources(*folders: str) -> dict[str, ast.Module]:
    """Parse the package's modules, by path below the package; all of them, or those of folders."""
    files = sorted(PACKAGE.rglob("*.py"))
    named = {file.relative_to(PACKAGE).as_posix(): file for file in files}
    return {
        name: ast.parse(file.read_text(encoding="utf-8"))
        for name, file in named.items()
        if not folders or name.partition("/")[0] in folders or name in folders
    }


def lines_of(name: str) -> list[str]:
    """Return the lines of one of the package's modules."""
    return (PACKAGE / name).read_text(encoding="utf-8").splitlines()


def functions(tree: ast.AST) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield functions and methods, by dotted name; nested functions come with their parents."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for name, method in functions(node):
                yield f"{node.name}.{name}", method


def imported(tree: ast.AST) -> set[str]:
    """Return the dotted names of all modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return found


def dotted(node: ast.expr) -> str:
    """Write `a.b.c` for an attribute of an attribute of a name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def written_files() -> list[Path]:
    """List the text files that people wrote, in a checkout or an unpacked archive."""
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name not in _MADE and not _is_cache(name)]
        found += [Path(folder) / name for name in names if not name.endswith((".png", ".npz"))]
    return sorted(found)


def _is_cache(name: str) -> bool:
    return name.endswith(("_cache", ".egg-info")) or name in {".hypothesis", ".gl"}
