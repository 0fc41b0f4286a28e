"""A Chromium that is installed, and a server to look at with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.server.page.visit import PATIENCE_MS, Visit

if TYPE_CHECKING:
    from tests.server.conftest import Running

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium here: apt install chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        yield one
        one.close()


@pytest.fixture(scope="module")
def slow(start: Any) -> Iterator[Running]:
    """A server of these tests' own, whose steps take long enough to be looked at."""
    with start() as one:
        one.slow_down(0.01)
        yield one


@pytest.fixture
def visit(browser: Browser, slow: Running) -> Iterator[Visit]:
    one = Visit(browser, slow.url)
    expect(one.page.locator("#state")).to_have_text("demo")
    yield one
    one.context.close()
    slow.wait_until_idle()
    assert not one.wrong
