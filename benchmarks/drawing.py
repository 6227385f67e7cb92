"""Plots as SVG text that equal figures make equal; needs matplotlib."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def svg(height: float, draw: Callable[["Axes"], None]) -> str:
    """Return what is drawn, 8 inches wide and so many high."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        # Without a salt, ids are random; text stays text.
        mpl.rc("svg", hashsalt="bigsimclr", fonttype="none")
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    # The document type names a remote file.
    text = buffer.getvalue()
    lines = text[text.index("<svg") :].splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"
