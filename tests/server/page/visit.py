"""A tab of a real browser on a real server, and what a reader does in it."""

from __future__ import annotations

import json
import re
from typing import Any

from playwright.sync_api import Browser, Dialog, Locator, Page, Route, expect

PATIENCE_MS = 20_000
CHAT = "**/v1/chat/completions"


class Visit:
    """A tab, and what went wrong in it: errors, requests to elsewhere, dialogs that text must not open."""

    def __init__(self, browser: Browser, url: str, *, before: str = "", **options: Any) -> None:
        """``before`` is a script that runs before those of each page."""
        self.context = browser.new_context(base_url=url, **options)
        self.context.add_init_script(before)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.wrong: list[str] = []
        self._url = url
        self.page.on("console", lambda said: self._note(said.type in ("error", "warning"), said.text))
        self.page.on("pageerror", lambda error: self._note(True, str(error)))
        self.page.on("request", lambda asked: self._note(self._is_foreign(asked.url), asked.url))
        self.page.on("dialog", self._refuse)
        self.page.goto("/")

    def _note(self, wrong: bool, what: str) -> None:
        if wrong:
            self.wrong.append(what)

    def _is_foreign(self, url: str) -> bool:
        return not url.startswith((f"{self._url}/", "data:"))

    def _refuse(self, dialog: Dialog) -> None:
        self.wrong.append(dialog.message)
        dialog.dismiss()


def saying(page: Page, text: str) -> None:
    """Let the model answer the next messages with ``text``."""

    def shape(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}")
        route.continue_(post_data=json.dumps({**body, "regex": re.escape(text).replace("\\\n", "\n")}))

    page.route(CHAT, shape)


def write(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def answer(page: Page) -> Locator:
    return page.locator(".message.assistant").last


def ended(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
