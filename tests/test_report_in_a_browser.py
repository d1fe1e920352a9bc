"""The report as a browser shows it, in light and in dark."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install '.[demo]'")

from benchmarks import report
from dpo_kernels.cli.rows import read_rows

ROWS = Path(report.__file__).parent / "results" / "logits_cpu.csv"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WIDTH, HEIGHT = 1100, 2400
# of the page's style: paper, ink and what our rows are written in
LIGHT = ((255, 255, 255), (26, 26, 26), (163, 39, 58))
DARK = ((22, 24, 28), (230, 230, 230), (240, 138, 152))

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One meeting of contenders, whose table and picture fit the window."""
    rows = read_rows(ROWS)
    first = rows[0]
    about = ("shape", "dtype", "scored_tokens", "layout", "mode")
    rows = [row for row in rows if all(row[name] == first[name] for name in about)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render(rows), encoding="utf-8")
    return path


def screenshot(page: Path, folder: Path, *options: str) -> np.ndarray:
    """[HEIGHT, WIDTH, 3] of 0 to 255."""
    from matplotlib.image import imread

    picture = folder / "page.png"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"),
        *(f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    return pixels


def share(pixels: np.ndarray, colour: tuple[int, int, int], within: int = 2) -> float:
    """Of the pixels, those of this colour."""
    return float((np.abs(pixels - np.array(colour)).max(-1) <= within).mean())


@pytest.mark.parametrize(
    ("option", "own", "other"),
    [
        ("--blink-settings=preferredColorScheme=1", LIGHT, DARK),
        ("--blink-settings=preferredColorScheme=0", DARK, LIGHT),
    ],
    ids=["light", "dark"],
)
def test_it_reads_well(page, tmp_path, option, own, other):
    pixels = screenshot(page, tmp_path, option)
    paper, ink, ours = own
    # paper to the window's edges, pictures included: nothing of the other setting shows
    assert share(pixels, paper) > 0.8
    assert all((np.abs(pixels[:, x] - paper).max(-1) <= 2).all() for x in (0, WIDTH - 1))
    assert share(pixels, other[0]) < 0.01
    # text, and the rows of ours in their own colour
    assert share(pixels, ink) > 1e-3
    assert share(pixels, ours) > 1e-4


def test_the_picture_of_times_has_bars_of_ours_and_of_others(page, tmp_path):
    """Bars are wide areas of one colour, which text never is."""
    pixels = screenshot(page, tmp_path)
    solid = [
        tuple(row[x])
        for row in pixels[::4]
        for x in range(0, WIDTH - 40, 20)
        if (row[x : x + 40] == row[x]).all()
    ]
    bars = {colour for colour in solid if colour != LIGHT[0] and max(colour) - min(colour) > 20}
    assert len(bars) >= 2
