"""The page in a real browser: it opens without a network and shows what it should."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigsimclr.report.html import write_report
from tests.report.fabricate import write_pipeline

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
DARK = "--blink-settings=preferredColorScheme=0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_pipeline(tmp_path_factory.mktemp("runs") / "digits"))


def browse(page: Path, profile: Path, *flags: str) -> str:
    assert BROWSER is not None
    home = {**os.environ, "HOME": str(profile)}
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=home
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shot(page: Path, folder: Path, *flags: str, width: int = 1100) -> np.ndarray:
    target = folder / "page.png"
    browse(page, folder / "profile", f"--window-size={width},900", f"--screenshot={target}", *flags)
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_light_screenshot_shows_a_page(page, tmp_path):
    pixels = shot(page, tmp_path)
    assert pixels.shape == (900, 1100, 3)
    assert pixels.mean() > 200
    assert (pixels.sum(axis=2) < 300).mean() > 0.005, "there is dark text"
    # The three lines of the curve, each in its own colour.
    for colour in ((11, 122, 95), (47, 95, 208), (180, 86, 15)):
        assert (np.abs(pixels - colour).sum(axis=2) < 30).sum() > 100


def test_dark_screenshot_is_dark_with_readable_plots(page, tmp_path):
    pixels = shot(page, tmp_path, DARK)
    assert pixels.mean() < 60
    for colour in ((63, 207, 159), (134, 168, 255), (242, 166, 90)):
        assert (np.abs(pixels - colour).sum(axis=2) < 30).sum() > 100


def test_narrow_page_does_not_scroll_sideways(page, tmp_path):
    # Anything wider than the window would reach over the margin at the right.
    pixels = shot(page, tmp_path, width=500)
    assert pixels.shape == (900, 500, 3)
    assert (pixels[:, -8:].max(axis=2) - pixels[:, -8:].min(axis=2)).max() <= 6
    assert pixels[:, -8:].min() > 220, "a margin is kept at the right"


def test_dom_contains_the_verdict(page, tmp_path):
    dom = html.unescape(browse(page, tmp_path / "profile", "--dump-dom"))
    verdict = json.loads(page.with_name("report.json").read_text())["verdict"]
    assert f"<h1>{verdict}</h1>" in dom.replace("\N{NO-BREAK SPACE}", " ")


def sideways(page: Path, folder: Path, width: int) -> list[bool]:
    """Say of each open table, in order, whether it is wider than its card in a narrow window."""
    measure = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify("
        "[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility())"
        ".map(e => e.scrollWidth > e.clientWidth)); });</script>"
    )
    copy = folder / "measured.html"
    open_page = re.sub(r"<meta http-equiv[^>]*>", measure, page.read_text(encoding="utf-8"))
    copy.write_text(open_page, encoding="utf-8")
    dom = browse(copy, folder / "profile", f"--window-size={width},900", "--dump-dom")
    found = re.search(r"<title>(\[.*?\])</title>", dom)
    assert found is not None
    return json.loads(found[1])


# 1085: a window of 1100 pixels with a scroll bar.
@pytest.mark.parametrize(("width", "expected"), [(1085, [False] * 3), (500, [False, True, True])])
def test_tables_fit_their_window(width, expected, page, tmp_path):
    assert sideways(page, tmp_path, width) == expected
