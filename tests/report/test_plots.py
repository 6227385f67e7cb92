import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import matplotlib as mpl
import pytest

from bigsimclr.report.plots import (
    DARK,
    LIGHT,
    Curve,
    Series,
    _spread_out,
    in_dark,
    label_efficiency_svg,
    plain,
    series_svg,
)

SVG = "{http://www.w3.org/2000/svg}"


def curve(name: str, means: list[float], tone: str = "ours") -> Curve:
    return Curve(name, tone, "o", [1, 2, 5], means, [1.0, 1.0, 0.0], [[m] for m in means])


def texts(svg: str) -> dict[str, tuple[float, float]]:
    """Map each text of a plot to its position."""
    found = {}
    for element in ET.fromstring(svg).iter(f"{SVG}text"):
        x, y = element.get("x"), element.get("y")
        if x is None:
            x, y = re.findall(r"[-\d.]+", element.get("transform", ""))[:2]
        found[element.text or ""] = (float(x), float(y))
    return found


def test_amounts_stand_on_a_logarithmic_axis():
    found = texts(label_efficiency_svg([curve("a", [50, 60, 70])], axis="labels"))
    one, two, five = (found[amount][0] for amount in ("1", "2", "5"))
    assert (five - one) / (two - one) == pytest.approx(math.log(5) / math.log(2), abs=1e-3)


def test_names_of_lines_that_end_together_do_not_overlap():
    curves = [curve(name, [50, 60, 70 + 0.1 * i]) for i, name in enumerate(("aa", "bb", "cc"))]
    found = texts(label_efficiency_svg(curves, axis="labels"))
    heights = sorted(found[name][1] for name in ("aa", "bb", "cc"))
    assert min(b - a for a, b in pairwise(heights)) > 9.5


def test_accuracy_never_goes_beyond_100():
    curves = [curve("a", [90, 99.9, 100])]
    found = texts(label_efficiency_svg(curves, axis="labels"))
    assert max(float(t) for t in found if re.fullmatch(r"\d+(\.\d+)?", t)) <= 101


def ticks(svg: str) -> list[float]:
    """Return the numbers along the vertical axis, which stand left of all others."""
    found = {t: at for t, at in texts(svg).items() if re.fullmatch(r"\d+(\.\d+)?%?", t)}
    left = min(x for x, _ in found.values())
    return sorted(float(t.rstrip("%")) for t, (x, _) in found.items() if x < left + 15)


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 40.0, 99.9, 100.0])
def test_a_single_accuracy_stands_on_an_axis_of_twenty_points(accuracy):
    single = Curve("a", "ours", "o", [1], [accuracy], [0.0], [[accuracy]])
    found = ticks(label_efficiency_svg([single], axis="labels"))
    assert found[-1] - found[0] >= 10
    assert 0 <= found[0] <= found[-1] <= 100
    assert len(found) >= 3


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.045, 0.4, 1.0])
def test_a_level_share_is_not_blown_up(share, from_zero):
    line = Series("", "ours", [1, 2, 3], [share, share + 1e-4, share])
    found = ticks(series_svg([line], scale="percent", x_label="x", from_zero=from_zero))
    assert found[-1] - found[0] >= 5
    assert 0 <= found[0] <= found[-1] <= 100


def test_names_part_evenly_and_only_where_they_must():
    assert _spread_out([10.0, 10.0, 50.0], 4.0) == [8.0, 12.0, 50.0]
    assert _spread_out([10.0, 11.0, 13.0], 4.0) == pytest.approx([22 / 3, 34 / 3, 46 / 3])
    assert _spread_out([], 4.0) == []


@pytest.mark.parametrize("narrow", [False, True])
def test_the_same_numbers_give_the_same_bytes_under_any_settings(narrow):
    def draw() -> str:
        return label_efficiency_svg([curve("a", [50, 60, 70])], axis="labels", narrow=narrow)

    first = draw()
    with mpl.rc_context({"font.size": 30, "svg.hashsalt": None, "lines.linewidth": 9}):
        assert draw() == first
        assert mpl.rcParams["font.size"] == 30


def test_a_dark_plot_differs_in_colour_only():
    lines = [Series("loss", tone, [1, 2, 3], [3, 2, 1]) for tone in LIGHT.tones]
    light = series_svg(lines, scale="plain", x_label="epochs", from_zero=False)
    dark = in_dark(light)
    colours = [set(re.findall(r"#[0-9a-f]{6}\b", svg)) for svg in (light, dark)]
    assert colours[0] == {LIGHT.faint, LIGHT.grid, *LIGHT.tones.values()}
    assert colours[1] == {DARK.faint, DARK.grid, *DARK.tones.values()}
    assert re.sub(r"#[0-9a-f]{6}\b", "", light) == re.sub(r"#[0-9a-f]{6}\b", "", dark)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("theme", "page"), [(LIGHT, "#ffffff"), (DARK, "#171b22")])
def test_every_colour_can_be_told_from_the_page(theme, page):
    for colour in (theme.ink, theme.faint, *theme.tones.values()):
        high, low = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_long_series_are_thinned_and_keep_their_end():
    x = [float(i) for i in range(100_000)]
    line = Series("loss", "second", x, [math.sin(i / 9000) for i in x])
    svg = series_svg([line], scale="plain", x_label="x", from_zero=False)
    assert len(svg) < 40_000


def test_gaps_single_points_and_odd_names_are_drawn():
    lines = [
        Series("a", "second", [1, 2, 3], [1.0, math.nan, 2.0]),
        Series("$\\frac{<b>&\u4e2d\x00", "ours", [2], [0.5], dashed=True),
    ]
    svg = series_svg(lines, scale="percent", x_label="epochs", from_zero=True)
    assert "$\\frac{<b>&" in texts(svg)


def test_plain_keeps_printable_ascii_and_cuts():
    assert plain("a\u4e2db\x1b[0m") == "ab[0m"
    assert len(plain("x" * 100)) == 40
