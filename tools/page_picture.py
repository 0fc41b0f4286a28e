"""Draws book/docs/img/page.png: the page in a Chromium, after a short chat, while sixteen requests run.

python tools/page_picture.py [--width 1320] [--height 900] [--dark] [--engine] [FILE]
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "book" / "docs" / "img" / "page.png"
ASKED = ("What is paged attention?", "Tell me a story.", "What is a block table?")
NARROW = 960  # pixels: below, the page shows chat or engine, not both


def main() -> int:
    """Start a server of the bundled model on a free port, and draw its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE)
    parser.add_argument("--width", type=int, default=1320, help="pixels")
    parser.add_argument("--height", type=int, default=900, help="pixels")
    parser.add_argument("--dark", action="store_true", help="as a browser that prefers dark colours shows it")
    parser.add_argument(
        "--engine", action="store_true", help="on a narrow screen, the engine and not the chat"
    )
    args = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        parser.error("no Chromium here: apt install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "serve", "--port", str(port), "--kv-memory", "24MB"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{port}/health")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(
                viewport={"width": args.width, "height": args.height},
                color_scheme="dark" if args.dark else "light",
            )
            page.goto(f"http://127.0.0.1:{port}/")
            _chat(page)
            if args.width > NARROW or args.engine:
                _run_sixteen(page, is_narrow=args.width <= NARROW)
            page.screenshot(path=args.file)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return 0


def _wait(url: str) -> None:
    """Until the server is ready, a minute at most."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("The server did not become ready.")


def _chat(page: Page) -> None:
    """A few turns, at temperature 0, so that the picture says the same each time."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    for asked in ASKED:
        page.get_by_label("Your message").fill(asked)
        page.get_by_label("Your message").press("Enter")
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=20_000)


def _run_sixteen(page: Page, *, is_narrow: bool) -> None:
    if is_narrow:
        page.locator("#show-live").click()
    for seconds in (6, 1):  # the first ones leave what is found in the cache, and curves
        page.locator("#load").click()
        expect(page.locator("#batch-words")).to_contain_text(re.compile("1[56] running"), timeout=20_000)
        page.wait_for_timeout(300)
        if seconds > 1:
            page.locator("#load").click()
            page.wait_for_timeout(1_000 * seconds)


if __name__ == "__main__":
    sys.exit(main())
