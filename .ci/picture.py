"""Draw docs/images/report.png: ``python .ci/picture.py RUN``, for a run that was evaluated.

The picture has the verdict, the table of numbers and the first curves of RUN/report.html, as Chromium shows
them in light mode. The sections between them are left out."""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"
WIDTH, SCALE = 1000, 1.2
"""Pixels of the page, and pixels of the picture for each."""
COLOURS = 128
STYLE = """
nav, footer, main > section:not(#answers):not(#curves), #answers .told { display: none }
#curves figure:nth-of-type(n + 3), #curves details, #curves > p { display: none }
body { padding-bottom: 24px }
"""
"""What of the page is left out."""


def draw(browser: Any, report: Path, out: Path) -> None:
    """``browser``: of playwright. ``report``: a report.html. Raises ValueError if it has no evaluation."""
    view = {"width": WIDTH, "height": 800}
    page = browser.new_page(viewport=view, color_scheme="light", device_scale_factor=SCALE)
    page.goto(report.resolve().as_uri())
    if page.locator("#differences, #curves").count() < 2:
        raise ValueError(f"{report}: no evaluation in it, or no curves")
    page.add_style_tag(content=STYLE)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    page.close()
    image.convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        out, optimize=True
    )


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description="Draw the picture of a report in README.")
    parser.add_argument("run", type=Path, help="run directory with a report.html")
    parser.add_argument("--out", type=Path, default=PICTURE)
    words = parser.parse_args()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        draw(browser, words.run / "report.html", words.out)
        browser.close()


if __name__ == "__main__":
    main()
