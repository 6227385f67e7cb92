"""Write docs/benchmarks.md, docs/performance.md and their plots from the results; print the pages.

    python -m benchmarks.render

A result file is NAME.json or NAME-anything.json, NAME being a benchmark below. Nothing else goes
into the pages, and equal files give equal pages. `benchmarks.parts` says what is in the first, all
tables as measured; `benchmarks.performance` makes the other, with targets and what explains them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import performance
from benchmarks.drawing import svg
from benchmarks.markdown import commit_of, filled, gpu_of, listed, machine_of, table
from benchmarks.parts import BENCHMARKS, Benchmark
from benchmarks.tables import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "benchmarks.md"
PLOT: Final = PAGE.with_suffix(".svg")
HEAD: Final = """\
# Benchmarks

Made by `make bench-docs` from the files in benchmarks/results; do not edit. `make bench` measures
again what a CPU can, `make gpu-check` what a GPU can. Figures are those of the files, long ones
rounded to four digits. Compare them within a table: machines differ, and so do their loads.
[performance.md](performance.md) has targets, floors and reasons.

![Times faster than others](benchmarks.svg)
"""


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
            parts.append(f"## {benchmark.title}\n\n{filled(benchmark.text)}\n")
        last = benchmark
        parts.append(f"### {name}\n\n{_facts(result)}\n")
        for caption, rows, columns in benchmark.tables(result):
            parts += [f"{caption}:\n"] * bool(caption)
            parts.append(table(rows, columns))
    return "\n".join(parts)


def _facts(result: Result) -> str:
    """Return machine, versions, settings, commit and command as a list."""
    machine = machine_of(result)
    machine.pop("commit", None)
    lines = [f"* Machine: {listed(machine)}."]
    if "settings" in result:
        lines.append(f"* Settings: {listed(result['settings'])}.")
    if "cut" in result:
        cut = result["cut"]
        lines.append(f"* Stopped after {cut['measured']} of {cut['of']} {cut['what']}.")
    return "\n".join([*lines, f"* Commit {commit_of(result)}, `{result['command']}`."])


def bars(folder: Path) -> list[tuple[str, float]]:
    """Return what the plot shows: how many times faster ours is than each of the others."""
    shown_bars = []
    for benchmark, _, result in results(folder):
        device = "CPU" if gpu_of(result) is None else "GPU"
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
    drawn = bars(folder)

    def draw(axes: "Axes") -> None:
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

    return svg(0.9 + 0.26 * len(drawn), draw)


def main() -> None:
    """Write both pages and their plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--folder", type=Path, default=PAGE.parent, help="of the pages")
    options = parser.parse_args()
    for name, of_page, of_plot in (
        (PAGE.name, page, plot),
        (performance.PAGE.name, performance.page, performance.plot),
    ):
        text = of_page(options.results)
        file = options.folder / name
        file.write_text(text, encoding="utf-8")
        print(text)
        try:
            file.with_suffix(".svg").write_text(of_plot(options.results), encoding="utf-8")
        except ModuleNotFoundError as missing:
            print(f"{missing.name} is not installed: no plot")


if __name__ == "__main__":
    main()
