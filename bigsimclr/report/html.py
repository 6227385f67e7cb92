"""The report of a run: one HTML page without scripts or addresses, and the same numbers as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.errors import StorageError
from bigsimclr.report.document import (
    Summary,
    commands,
    report_json,
    summarise,
)
from bigsimclr.report.facts import Run, RunSet, number, read_run_set
from bigsimclr.report.figures import (
    Picture,
    classifier_pictures,
    classifier_steps,
    curve_picture,
    pretraining_pictures,
)
from bigsimclr.report.pages import page_template
from bigsimclr.report.tables import (
    cell_text,
    curve_table,
    descent,
    goodput_lines,
    lineage_cells,
    missing_curve,
    missing_training,
    result_line,
    tiles,
)
from bigsimclr.storage import publish

_SECRETS = ("token", "secret", "password", "passwd", "credential", "api_key", "apikey")


@dataclass(frozen=True)
class Curves:
    """The training plots of one step."""

    title: str
    is_open: bool
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe of a step, with its plan."""

    title: str
    varies: str  # what differs between the runs of the step
    text: str
    plan: tuple[tuple[str, str], ...]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `report.json` into a run directory and return the page's path.

    The directory is a pipeline's or a single run's, finished or not: what has not been run yet is
    shown as such. Both files are replaced whole, so a reader never sees half a report, and
    depend on nothing but the directory's files: the same run gives the same bytes.

    Args:
        run_dir: a directory that `bigsimclr run` made.

    Raises:
        StorageError: the directory is missing or cannot be written.
    """
    if not run_dir.is_dir():
        raise StorageError(f"{run_dir / 'report.json'} cannot be written: no such directory")
    summary = summarise(read_run_set(run_dir))
    publish(run_dir / "report.json", report_json(summary))
    return publish(run_dir / "report.html", render_page(summary))


def render_page(summary: Summary) -> str:
    """Return the HTML page; every text from the run directory is escaped."""
    run_set = summary.run_set
    return page_template("report.html.j2").render(
        name=run_set.name,
        # A deviation must not stand alone at the start of a line.
        verdict=summary.verdict.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"),
        progress=f"{summary.finished} of {len(run_set.runs)} runs finished",
        notes=run_set.notes,
        tiles=tiles(summary),
        curve=curve_picture(summary.points),
        curve_table=curve_table(summary),
        missing_curve=missing_curve(run_set),
        missing_training=missing_training(run_set),
        results=[result_line(row) for row in summary.rows],
        resolution=_resolution(run_set),
        training=_training(run_set),
        goodput=goodput_lines(run_set),
        descent=descent(run_set) if run_set.is_pipeline else [],
        lineage=[lineage_cells(run_set, run) for run in (*run_set.ancestors, *run_set.runs)],
        recipes=_recipes(run_set),
        pipeline_text=run_set.pipeline_text,
        environment=_environment(run_set.runs),
        commands=commands(run_set),
        noted=run_set.command is not None,
    )


def _resolution(run_set: RunSet) -> str:
    counts = {number(run.protocol.get("n")) for run in run_set.runs if run.result is not None}
    count = counts.pop() if len(counts) == 1 else None
    if not count or count <= 0:
        return ""
    return f"One of the {count:,.0f} held-out images is {100 / count:.2g} points."


def _training(run_set: RunSet) -> list[Curves]:
    sections = [
        Curves(
            title=run.step if run.path in (".", run.step) else f"{run.step}: {run.path}",
            is_open=True,
            pictures=p,
        )
        for run in run_set.runs
        if run.stage == "pretrain" and (p := pretraining_pictures(run))
    ]
    for step in classifier_steps(run_set):
        runs = [run for run in run_set.of_step(step) if run.records]
        pictures = classifier_pictures(run_set, runs)
        if pictures:
            sections.append(
                Curves(
                    title=step.name if len(runs) == 1 else f"{step.name}, {len(runs)} runs",
                    is_open=not run_set.is_pipeline,
                    pictures=pictures,
                )
            )
    return sections


def _recipes(run_set: RunSet) -> list[Recipe]:
    shown: list[Recipe] = []
    for step in run_set.steps:
        runs = [run for run in run_set.of_step(step) if run.recipe_text]
        if not runs:
            continue
        plan = tuple((key, cell_text(value)) for key, value in sorted(runs[0].plan.items()))
        title = step.name if len(runs) == 1 else f"{step.name}: {runs[0].path}"
        shown.append(Recipe(title, _variation(runs), runs[0].recipe_text, plan))
    return shown


def _variation(runs: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.grid)
    parts = []
    for key in keys:
        values = dict.fromkeys(cell_text(run.grid.get(key)) for run in runs)
        parts.append(f"{key} = {', '.join(values)}")
    return "; ".join(parts)


def _environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in run.environment.items():
            hidden = any(word in key.lower() for word in _SECRETS)
            seen.setdefault(key, {})["(not shown)" if hidden else cell_text(value)] = None
    return [(key, " or ".join(values)) for key, values in seen.items()]
