"""Plots as SVG text: for light and dark pages, the same bytes for the same numbers."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

Tone = Literal["ours", "second", "baseline", "reference"]

_CURVE_SPAN = 20.0  # points that the axis of the label-efficiency plot covers at least
_SERIES_SPAN = 10.0  # the same of a small plot in percent
_MOST_POINTS = 600  # per line; more cannot be told apart at this size
# Text stays text in the reader's own font; the width of DejaVu, the widest, decides the layout.
_FONTS = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one page background; all but the grid have at least 4.5:1 contrast on it."""

    ink: str
    faint: str
    grid: str
    tones: Mapping[Tone, str]


LIGHT = Theme(
    ink="#1f2430",
    faint="#667085",
    grid="#e7e9ee",
    tones={
        "ours": "#0b7a5f",
        "second": "#2f5fd0",
        "baseline": "#b4560f",
        "reference": "#667086",
    },
)
DARK = Theme(
    ink="#e6e8ee",
    faint="#98a1b3",
    grid="#2b303b",
    tones={
        "ours": "#3fcf9f",
        "second": "#86a8ff",
        "baseline": "#f2a65a",
        "reference": "#98a1b3",
    },
)


@dataclass(frozen=True)
class Curve:
    """A line of the label-efficiency plot, in percent."""

    name: str
    tone: Tone
    marker: str  # a matplotlib marker, so that lines differ without colour too
    amounts: Sequence[float]  # labels per class, or percent of the labels
    means: Sequence[float]
    deviations: Sequence[float]  # 0 where there is a single value
    values: Sequence[Sequence[float]]  # of each label draw


@dataclass(frozen=True)
class Series:
    """A line over the examples seen."""

    name: str  # "" keeps it out of the legend
    tone: Tone
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    thin: bool = False  # one of many like lines


def label_efficiency_svg(curves: Sequence[Curve], *, axis: str, narrow: bool = False) -> str:
    """Draw accuracy over the amount of labels, with one standard deviation over the label draws.

    Args:
        curves: one line for each method.
        axis: what the amounts count.
        narrow: draw for the width of a telephone.
    """
    with _style():
        figure = Figure(
            figsize=(3.9, 3.7) if narrow else (10.4, 4.2), layout="constrained", facecolor="none"
        )
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for position, curve in enumerate(curves):
            # Lines stand a little apart so that error bars at one amount do not cover each other.
            shift = 1 + (0.07 if narrow else 0.036) * (position - (len(curves) - 1) / 2)
            _draw_curve(axes, curve, shift=shift, colour=LIGHT.tones[curve.tone])
        amounts = sorted({amount for curve in curves for amount in curve.amounts})
        axes.xaxis.set_major_locator(FixedLocator(amounts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(min(amounts) / 1.18, max(amounts) * 1.18)
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy, % of held-out images")
        axes.set_ylim(_percent_limits(axes.get_ylim(), least=_CURVE_SPAN))
        _name_lines(axes, curves)
        return _svg(figure)


def _draw_curve(axes: Axes, curve: Curve, *, shift: float, colour: str) -> None:
    x = [amount * shift for amount in curve.amounts]
    for place, values in zip(x, curve.values, strict=True):
        beside = [place * 0.985] * len(values)
        axes.plot(beside, values, ".", color=colour, alpha=0.45, markersize=5, clip_on=False)
    axes.errorbar(
        x,
        curve.means,
        yerr=curve.deviations,
        color=colour,
        marker=curve.marker,
        markersize=6.5,
        linewidth=2.0,
        elinewidth=1.3,
        capsize=3.5,
    )


def _name_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each line's name at its right end, pushed apart where ends meet."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ends = sorted(((curve.means[-1], curve) for curve in curves), key=lambda end: end[0])
    heights = _spread_out([height for height, _ in ends], gap)
    overshoot = max(0.0, heights[-1] - (high - gap / 2)) if heights else 0.0
    for height, (_, curve) in zip(heights, ends, strict=True):
        axes.annotate(
            plain(curve.name),
            xy=(1.0, height - overshoot),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=LIGHT.tones[curve.tone],
            fontweight="bold",
            annotation_clip=False,
        )


def _spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights as little as keeps them a gap apart: neighbours part evenly."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1], gap) < _highest(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    return [_lowest(group, gap) + gap * place for group in groups for place in range(len(group))]


def _lowest(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _highest(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def _percent_limits(limits: tuple[float, float], *, least: float) -> tuple[float, float]:
    """Widen an axis in percent to a span that does not blow up noise, within 0 to 100."""
    low, high = limits
    missing = max(0.0, least - (high - low))
    low, high = low - missing / 2, high + missing / 2
    # A little beyond either end, so that a line at 0 or 100 is not cut in half.
    low, high = (low, min(high, 101.0)) if low > -1.0 else (-1.0, min(max(high, least), 101.0))
    return (low, high) if high - low >= least else (high - least, high)


def series_svg(
    series: Sequence[Series],
    *,
    scale: Literal["plain", "percent"],
    x_label: str,
    from_zero: bool,
) -> str:
    """Draw a small plot of recorded values over training.

    Args:
        series: the lines; values that are not finite leave a gap.
        scale: plain numbers, or fractions shown as percent.
        x_label: what the horizontal axis counts.
        from_zero: begin the vertical axis at 0.
    """
    factor = 100.0 if scale == "percent" else 1.0
    with _style():
        figure = Figure(figsize=(3.7, 2.3), layout="constrained", facecolor="none")
        axes = figure.add_subplot()
        for line in series:
            x, y = _thinned(line.x, line.y)
            axes.plot(
                x,
                [factor * value for value in y],
                color=LIGHT.tones[line.tone],
                linestyle="--" if line.dashed else "-",
                linewidth=0.9 if line.thin else 1.9,
                alpha=0.55 if line.thin else 1.0,
                label=plain(line.name) or "_",
                marker="o" if len(y) < 3 else None,
                markersize=4,
            )
        axes.margins(x=0.01, y=0.08)
        if scale == "percent":
            axes.set_ylim(_percent_limits(axes.get_ylim(), least=_SERIES_SPAN))
        if from_zero:
            axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if axes.get_xlim()[1] >= 1000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}%" if scale == "percent" else f"{value:g}")
        )
        axes.set_xlabel(x_label)
        if sum(bool(line.name) for line in series) > 1:
            axes.legend(frameon=False, labelcolor="linecolor", handlelength=1.4)
        return _svg(figure)


def in_dark(svg: str) -> str:
    """Give a plot the colours of a dark page; drawing it again would take as long as the first.

    Args:
        svg: a plot of this module.
    """
    pairs = {LIGHT.ink: DARK.ink, LIGHT.faint: DARK.faint, LIGHT.grid: DARK.grid}
    pairs |= {LIGHT.tones[tone]: DARK.tones[tone] for tone in LIGHT.tones}
    for light, dark in pairs.items():
        svg = svg.replace(light, dark)
    return svg


def plain(name: str) -> str:
    """Keep the printable ASCII of a name, so that no font or reader stumbles over it."""
    kept = "".join(character for character in name if " " <= character <= "~")
    return kept if len(kept) <= 40 else f"{kept[:39]}."


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbouring points until few enough are left; the last point always stays."""
    stride = math.ceil(len(x) / _MOST_POINTS)
    if stride <= 1:
        return list(x), list(y)
    pieces = [slice(start, start + stride) for start in range(0, len(x) - 1, stride)]
    thin_x = [sum(x[piece]) / len(x[piece]) for piece in pieces]
    thin_y = [sum(y[piece]) / len(y[piece]) for piece in pieces]
    return [*thin_x, x[-1]], [*thin_y, y[-1]]


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()  # a person's own matplotlibrc must not change a report
        mpl.rc("svg", hashsalt="bigsimclr", fonttype="none")  # without a salt, ids are random
        mpl.rc("text", color=LIGHT.ink, parse_math=False)
        mpl.rc("font", family=["DejaVu Sans"], size=9.5)
        mpl.rc("axes", edgecolor=LIGHT.grid, labelcolor=LIGHT.faint, facecolor="none")
        mpl.rc("axes", grid=True, axisbelow=True, unicode_minus=False)
        mpl.rc("axes.spines", top=False, right=False)
        mpl.rc("grid", color=LIGHT.grid, linewidth=0.8)
        mpl.rc("xtick", color=LIGHT.grid, labelcolor=LIGHT.faint)
        mpl.rc("ytick", color=LIGHT.grid, labelcolor=LIGHT.faint)
        mpl.rc("legend", fontsize=9.0)
        yield


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Figure.savefig would draw everything twice.
    canvas = FigureCanvasSVG(figure)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]  # by matplotlib
    drawn = buffer.getvalue()
    # The document type names a remote file; browsers ignore it, scanners for addresses do not.
    return drawn[drawn.index("<svg") :].replace("'DejaVu Sans'", _FONTS)
