"""report.html in a real browser: it draws, the slider moves the numbers, and the console stays empty."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up import made_up, write
from matplotlib import image

from smoe.methods import METHODS
from smoe.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)"),
]

# Asks for k = 4, then leaves what a reader sees in the page's title.
MOVE = """
<script>
addEventListener("load", () => setTimeout(() => {
  slider.value = 2;
  slider.dispatchEvent(new Event("input"));
  setTimeout(() => { document.title = "moved " + view.signal("k"); }, 500);
}, 1500));
</script>
"""


def browse(page: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [
        f"--user-data-dir={home}",
        "--enable-logging=stderr",
        "--virtual-time-budget=8000",
        "--window-size=1100,1100",
    ]
    done = subprocess.run([*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_page_draws_and_the_slider_moves_the_numbers(tmp_path):
    results, figures = tmp_path / "results", tmp_path / "Figs"
    figures.mkdir()
    write(results, [made_up(method) for method in METHODS])
    write_report(results, figures)
    page = results / "report.html"
    before, end, after = page.read_text().rpartition("</body>")  # Vega has such a text too
    page.write_text(before + MOVE + end + after)
    done = browse(page, tmp_path / "home", "--dump-dom")
    assert not re.search(r"CONSOLE", done.stderr), done.stderr  # neither errors nor warnings
    assert "<title>moved 4</title>" in done.stdout
    assert '<output id="k-value">k = 4</output>' in done.stdout
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", done.stdout)
    expected = {}
    for method, entry in METHODS.items():
        test = made_up(method)["metrics"]["bpc"]["test"]
        expected[entry.title] = f"{test.get('4', test.get('dense')):.4f}"
    assert dict(rows) == expected
    assert done.stdout.count('aria-roledescription="point"') == 3 * 6 + 3  # in the chart: every k, every dense run


def test_page_looks_like_something(tmp_path):
    results, figures = tmp_path / "results", tmp_path / "Figs"
    figures.mkdir()
    write(results, [made_up(method) for method in METHODS])
    write_report(results, figures)
    shot = tmp_path / "page.png"
    browse(results / "report.html", tmp_path / "home", f"--screenshot={shot}")
    pixels = image.imread(shot)
    assert pixels.shape[:2] == (1100, 1100)
    chart = pixels[200:550, 100:700, :3].reshape(-1, 3)
    blue = ((chart - (0, 0x72 / 255, 0xB2 / 255)) ** 2).sum(axis=1) < 1e-3  # SMoE-Dropout's line
    assert blue.sum() > 300
