"""An installed Chromium, driven over pages on the disk; run as a program, it takes the screenshot of the README.

    python tests/report/browser.py reports/index.html reports/index.png

Needs `pip install -e '.[browser]'` and Chromium, which is looked for on the PATH or taken from `$CHROMIUM`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
# Chromium itself asks the network nothing then.
_QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
_PLAIN = ["--disable-gpu", "--disable-quic"]


@contextmanager
def chromium() -> Iterator:
    """A playwright Browser. Raises FileNotFoundError where no Chromium is installed."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        raise FileNotFoundError(f"no Chromium: install one of {', '.join(_NAMES)} or name it by CHROMIUM")
    # The sandbox refuses to run for the administrator, as whom CI often does.
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    arguments = [*_QUIET, *_PLAIN, *(["--no-sandbox"] if is_root else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def screenshot(page_path: Path, png: Path) -> None:
    """The head of a report as it opens on a wide screen, down to its first plot."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1500}, color_scheme="light")
        page.goto(page_path.resolve().as_uri())
        page.screenshot(path=png)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
