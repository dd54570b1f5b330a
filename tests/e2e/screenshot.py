"""`python -m tests.e2e.screenshot`: take the README's picture of the playground anew, from a fresh server with the demo.

For a maintainer who changed the page. Debian's fonts-inter and fonts-urw-base35 give it the letters that it has.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from tests.e2e.browser import Visit, browsing, missing, visiting
from tests.e2e.server import started

FILE = Path(__file__).parents[2] / "deploy/playground.png"
ADDRESS = "http://127.0.0.1:8000"


def main() -> None:
    if reason := missing():
        sys.exit(reason)
    size = {"width": 1240, "height": 800}
    with started() as server, browsing() as browser, visiting(browser, server.url, viewport=size, device_scale_factor=1.5) as visit:
        rank_the_drawn_ones(visit)
        visit.page.screenshot(path=FILE, full_page=True)
    shrink(FILE)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


def rank_the_drawn_ones(visit: Visit) -> None:
    """The address shown is the one that everybody has, not the free port of this moment."""
    visit.drawn(0).click()
    visit.page.get_by_text("penguin-office.png", exact=True).wait_for()
    visit.rank()
    visit.page.evaluate("([ours, usual]) => { curl.textContent = curl.textContent.replace(ours, usual); }", [visit.origin, ADDRESS])
    visit.page.mouse.move(0, 0)


def shrink(file: Path) -> None:
    """256 colours are enough for ink, paper and a drawn cartoon."""
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
