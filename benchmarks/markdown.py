"""How a value, a table and a result's origin look on the pages."""

import textwrap
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.tables import Result, Row

LONGEST: Final = 10  # characters of a figure that is shown as it is


def filled(text: str) -> str:
    """Break a paragraph into lines."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def machine_of(result: Result) -> dict[str, Any]:
    """Return what a result tells of its machine and software."""
    environment = result.get("environment", {})
    return {**environment, **environment.get("machine", {}), **result.get("machine", {})}


def gpu_of(result: Result) -> str | None:
    """Return the name of the GPU that was measured; None for a CPU."""
    machine = machine_of(result)
    device = machine.get("device", "cpu")
    name = machine.get("gpu") or (None if device == "cpu" else device)
    return None if name is None else str(name)


def commit_of(result: Result) -> str:
    """Return the commit that was measured."""
    return str(result.get("commit") or machine_of(result).get("commit") or "not known")


def listed(facts: Mapping[str, Any]) -> str:
    """Return the facts that are one word or number, in a row."""
    return ", ".join(
        f"{name.replace('_', ' ')} {shown(value)}"
        for name, value in facts.items()
        if not isinstance(value, dict | list) and value is not None
    )


def table(rows: list[Row], columns: Mapping[str, str]) -> str:
    """Return a table without the columns that no row has.

    Args:
        rows: as a result has them.
        columns: for each heading the keys that lead to the value, with dots between them.
    """
    cells = {
        heading: [shown(found(row, path)) for row in rows] for heading, path in columns.items()
    }
    kept = {heading: column for heading, column in cells.items() if any(column)}
    numbers = [all(_is_number(found(row, columns[heading])) for row in rows) for heading in kept]
    lines = [list(kept), ["---:" if right else "---" for right in numbers]]
    lines += [list(line) for line in zip(*kept.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def found(row: Row, path: str) -> Any:
    """Return what the keys of a path lead to; None where they lead nowhere."""
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def shown(value: Any) -> str:
    """Return a value as text."""
    if value is None:
        return ""
    if isinstance(value, float) and len(repr(value)) > LONGEST:
        return f"{value:.4g}"
    return str(value)


def number(value: float) -> str:
    """Return three digits of a figure, and all of those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
