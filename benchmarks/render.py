"""Write docs/benchmarks.md and its plot from the result files, and print the page.

    python -m benchmarks.render

A result file is NAME.json or NAME-anything.json, NAME being a benchmark below. Nothing else goes
into the page, and equal files give an equal page; `benchmarks.parts` says what is in it.
"""

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.parts import BENCHMARKS, Benchmark
from benchmarks.tables import Result, Row

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "benchmarks.md"
PLOT: Final = PAGE.with_suffix(".svg")
HEAD: Final = """\
# Benchmarks

Made by `python -m benchmarks.render` from the files in benchmarks/results; do not edit.
`make bench` measures again what a CPU can, `make gpu-check` what a GPU can. Figures are those of
the files, long ones rounded to four digits. Compare them within a table: machines differ, and so do
their loads.

![Times faster than others](benchmarks.svg)
"""
LONGEST: Final = 10  # characters of a figure that is shown as it is


def results(folder: Path) -> Iterator[tuple[Benchmark, str, Result]]:
    """Yield every result in the page's order: benchmark, file name and content."""
    for benchmark in BENCHMARKS:
        files = [
            folder / f"{benchmark.name}.json",
            *sorted(folder.glob(f"{benchmark.name}-*.json")),
        ]
        for file in files:
            if file.exists():
                yield benchmark, file.name, json.loads(file.read_text(encoding="utf-8"))


def page(folder: Path) -> str:
    """Return the page on the results in a folder."""
    parts = [HEAD]
    last = None
    for benchmark, name, result in results(folder):
        if benchmark is not last:
            parts.append(f"## {benchmark.title}\n\n{_filled(benchmark.text)}\n")
        last = benchmark
        parts.append(f"### {name}\n\n{_facts(result)}\n")
        for caption, rows, columns in benchmark.tables(result):
            parts += [f"{caption}:\n"] * bool(caption)
            parts.append(table(rows, columns))
    return "\n".join(parts)


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _machine(result: Result) -> dict[str, Any]:
    environment = result.get("environment", {})
    return {**environment, **environment.get("machine", {}), **result.get("machine", {})}


def _facts(result: Result) -> str:
    """Return machine, versions, settings, commit and command as a list."""
    machine = _machine(result)
    commit = result.get("commit") or machine.get("commit")
    machine.pop("commit", None)
    lines = [f"* Machine: {_listed(machine)}."]
    if "settings" in result:
        lines.append(f"* Settings: {_listed(result['settings'])}.")
    return "\n".join([*lines, f"* Commit {commit}, `{result['command']}`."])


def _listed(facts: Mapping[str, Any]) -> str:
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


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def bars(folder: Path) -> list[tuple[str, float]]:
    """Return what the plot shows: how many times faster ours is than each of the others."""
    shown_bars = []
    for benchmark, _, result in results(folder):
        machine = _machine(result)
        device = "GPU" if "gpu" in machine or machine.get("device", "cpu") != "cpu" else "CPU"
        for group, times in benchmark.times(result).items():
            ours = next(method for method in benchmark.ours if method in times)
            shown_bars += [
                (f"{group}, {device}: {other}", taken / times[ours])
                for other, taken in times.items()
                if other in benchmark.others
            ]
    return shown_bars


def plot(folder: Path) -> str:
    """Return the plot as SVG text; needs matplotlib."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = bars(folder)
    with mpl.rc_context():
        mpl.rcdefaults()
        # Without a salt, ids are random; text stays text.
        mpl.rc("svg", hashsalt="bigsimclr", fonttype="none")
        figure = Figure(figsize=(8, 0.9 + 0.26 * len(drawn)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(drawn))
        axes.barh(places, [ratio - 1 for _, ratio in drawn], left=1, color="#0b7a5f", height=0.7)
        axes.axvline(1, color="#667085", linewidth=1)
        for place, (_, ratio) in zip(places, drawn, strict=True):
            axes.text(max(ratio, 1) * 1.04, place, f"{ratio:.2f}", va="center", fontsize=8)
        axes.set_yticks(places, [label for label, _ in drawn], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.12, y=0.02)
        axes.set_xlabel("their time over ours, medians of one run")
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    # The document type names a remote file.
    text = buffer.getvalue()
    lines = text[text.index("<svg") :].splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> None:
    """Write page and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the plot goes beside it")
    options = parser.parse_args()
    text = page(options.results)
    options.page.write_text(text, encoding="utf-8")
    print(text)
    try:
        drawn = plot(options.results)
    except ModuleNotFoundError as missing:
        print(f"{missing.name} is not installed: no plot")
        return
    options.page.with_suffix(".svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
