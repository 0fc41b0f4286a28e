"""The page in a real browser, on a real server: what a reader does, and what a model must not do to one.

What the model says is chosen by the server's own grammars: the request is given a regex on its way.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, Route, expect, sync_playwright

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Running

pytestmark = pytest.mark.slow

PATIENCE_MS = 20_000
CHAT = "**/v1/chat/completions"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = """<img src=x onerror=alert(1)> <script>alert(2)</script> [one](javascript:alert(3)) \
[two](https://example.org/a) **bold** `<b>code</b>` ![three](http://127.0.0.1:9/x.png)

- first
- second

```html
<iframe src="http://127.0.0.1:9/"></iframe>
```"""


class Visit:
    """A tab, and what went wrong in it: errors, requests to elsewhere, dialogs that text must not open."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **options)
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


def saying(page: Page, text: str) -> None:
    """Let the model answer the next messages with ``text``."""

    def shape(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}")
        route.continue_(post_data=json.dumps({**body, "regex": re.escape(text).replace("\\\n", "\n")}))

    page.route(CHAT, shape)


def write(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def answer(page: Page) -> Any:
    return page.locator(".message.assistant").last


def ended(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_an_answer_comes_in_pieces(visit: Visit) -> None:
    page = visit.page
    page.evaluate(
        """() => {
            window.seen = new Set();
            const note = () => seen.add(document.querySelector(".assistant > .text")?.textContent.length);
            const all = { childList: true, subtree: true };
            new MutationObserver(note).observe(document.getElementById("messages"), all);
        }"""
    )
    saying(page, "piece by piece " * 20)
    write(page, "Go on.")
    expect(page.locator(".busy")).to_be_visible()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    ended(page)
    assert page.evaluate("seen.size") > 3, "the text grew as it came"


def test_a_chat_is_remembered_until_the_next(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    write(page, "The password of the red door is zimbro.")
    ended(page)
    write(page, "Which password opens the red door?")
    expect(answer(page).locator(".text").last).to_have_text("The password of the red door is zimbro.")
    expect(answer(page).locator(".note")).to_contain_text("tokens · first after")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_role("heading", name="Ask it something, and watch it work.")).to_be_visible()


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_request_and_keeps_the_text(
    visit: Visit, slow: Running, until: Callable[..., None], way: str
) -> None:
    page, engine = visit.page, slow.engine.llm.engine
    before = engine.totals.ends["cancelled"]
    saying(page, "on and on " * 60)
    write(page, "Go on.")
    expect(answer(page).locator(".text").last).to_contain_text("on and on")
    if way == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    ended(page)
    until(lambda: engine.totals.ends["cancelled"] == before + 1, "the request to end")
    expect(answer(page).locator(".note")).to_contain_text("stopped")
    expect(answer(page).locator(".text").last).to_contain_text("on and on")


def test_sixteen_requests_are_seen_in_map_and_batch(visit: Visit, slow: Running) -> None:
    page = visit.page
    expect(page.locator("#map-words")).not_to_be_empty()
    picture = page.locator("#map").evaluate("map => map.toDataURL()")
    page.get_by_role("button", name="Send 16 prompts").click()
    expect(page.locator("#batch li[data-state=decode]")).to_have_count(16)
    expect(page.locator("#batch-words")).to_contain_text("16 running")
    expect(page.locator("#map-words")).to_contain_text(re.compile(r" [1-9]\d+ in use"))
    during = page.locator("#map").evaluate("map => map.toDataURL()")
    assert during != picture
    colours = page.locator("#map").evaluate(
        """map => new Set(Array.from(new Uint32Array(map.getContext("2d")
            .getImageData(0, 0, map.width, map.height).data.buffer))).size"""
    )
    assert colours > 16, "each request has a colour"
    expect(page.locator("#figures dd").first).not_to_have_text("0")
    page.get_by_role("button", name="Stop them").click()
    expect(page.locator("#batch li")).to_have_count(0)
    expect(page.locator("#map-words")).to_contain_text(" 0 in use")
    assert page.locator("#map").evaluate("map => map.toDataURL()") != during


def test_what_a_model_says_is_inert(visit: Visit) -> None:
    page = visit.page
    saying(page, HOSTILE)
    write(page, "Be bad.")
    text = answer(page).locator(".text").last
    expect(text.locator("pre")).to_contain_text('<iframe src="http://127.0.0.1:9/"></iframe>')
    ended(page)
    expect(text).to_contain_text("<img src=x onerror=alert(1)> <script>alert(2)</script>")
    expect(text).to_contain_text("[one](javascript:alert(3))")
    expect(text).to_contain_text("![three](http://127.0.0.1:9/x.png)")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("p code")).to_have_text("<b>code</b>")
    assert text.locator("li").all_inner_texts() == ["first", "second"]
    assert text.locator("img, script, iframe, b, [onerror], [style]").count() == 0
    links = text.locator("a")
    expect(links).to_have_count(1)
    assert links.get_attribute("href") == "https://example.org/a"
    assert set((links.get_attribute("rel") or "").split()) >= {"noopener", "noreferrer"}
    page.locator("body").evaluate("body => body.append(document.createTextNode('<b>'))")
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError", "no script can make HTML of a string"
    assert "TrustedHTML" in visit.wrong.pop()


MARKDOWN = [
    ("a **b** *c* _d_ ~~e~~", "<p>a <strong>b</strong> <em>c</em> <em>d</em> <s>e</s></p>"),
    ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
    ("# One\ntext", "<h3>One</h3><p>text</p>"),
    ("a ``b ` c`` d", "<p>a <code>b ` c</code> d</p>"),
    ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("3. a\n4. **b**", '<ol start="3"><li>a</li><li><strong>b</strong></li></ol>'),
    ("> quoted\n> - x", "<blockquote><p>quoted</p><ul><li>x</li></ul></blockquote>"),
    ("so:\n- a", "<p>so:</p><ul><li>a</li></ul>"),
    ("---", "<hr>"),
    ("&lt;b&gt; <b>", "<p>&amp;lt;b&amp;gt; &lt;b&gt;</p>"),
    *[
        (f"[x]({bad})", f"<p>[x]({bad})</p>")
        for bad in (
            "javascript:alert(1)",
            "JaVaScRiPt:alert(1)",
            "data:text/html,x",
            "vbscript:x",
            "//evil.example",
            "/v1/models",
            "file:///etc/passwd",
            "blob:http://x/y",
        )
    ],
]


def test_markdown_becomes_nodes(visit: Visit) -> None:
    made = visit.page.evaluate(
        """async (texts) => {
            const { show } = await import("/page/markdown.js");
            return texts.map((text) => {
                const [whole, grown] = [document.createElement("div"), document.createElement("div")];
                show(whole, text);
                for (let end = 0; end <= text.length; end++) show(grown, text.slice(0, end));
                return [whole.innerHTML, grown.innerHTML];
            });
        }""",
        [text for text, _ in MARKDOWN],
    )
    for (text, html), (whole, grown) in zip(MARKDOWN, made, strict=True):
        assert whole == html, text
        assert grown == html, f"{text!r} letter by letter"


def test_endless_marks_are_shown_all_the_same(visit: Visit) -> None:
    """Quotes in quotes without end filled the stack; a pattern that tries all ways would hang here."""
    marks = ["**a ", "`a ", "[a](b", "~~a", "_a ", "*a ", "# #", "> " * 9 + "x ", "|-"]
    missing = visit.page.evaluate(
        """async (marks) => {
            const { show } = await import("/page/markdown.js");
            return marks.filter((mark) => {
                const box = document.createElement("div");
                show(box, mark.repeat(4000));
                return box.textContent.length < 4000;
            });
        }""",
        marks,
    )
    assert not missing


def test_thoughts_are_folded(visit: Visit) -> None:
    page = visit.page
    saying(page, "<think>Is it 2?</think>It is 3.")
    write(page, "What is 1 + 2?")
    ended(page)
    expect(answer(page).get_by_text("Is it 2?")).to_be_hidden()
    expect(answer(page).locator("> .text")).to_have_text("It is 3.")
    answer(page).get_by_text("What it thought").click()
    expect(answer(page).get_by_text("Is it 2?")).to_be_visible()


def test_an_error_is_told_in_the_servers_words_and_can_be_tried_again(visit: Visit) -> None:
    page = visit.page
    write(page, "word " * 3000)
    expect(page.get_by_role("alert")).to_contain_text("the context holds 1024")
    assert "400" in visit.wrong.pop(), "the browser's own note of it"
    page.get_by_role("button", name="New chat").click()
    page.route(CHAT, lambda route: route.abort())
    write(page, "What is 48 + 35?")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    visit.wrong.clear()
    page.unroute(CHAT)
    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_contain_text("first after")
    expect(page.locator(".message.user")).to_have_count(1)
    expect(page.get_by_role("alert").filter(visible=True)).to_have_count(0)


def test_all_by_keyboard(visit: Visit) -> None:
    page = visit.page
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("48 + 35?")
    expect(page.get_by_label("Your message")).to_have_value("What is\n48 + 35?")
    page.keyboard.press("Enter")
    ended(page)
    expect(page.locator(".message.user p")).to_have_text("What is 48 + 35?")
    expect(page.locator("#said")).to_contain_text("Answer:")
    page.reload()
    expect(page.locator("#state")).to_have_text("demo")
    page.locator(".skip").focus()
    order: list[str] = []
    for _ in range(9):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", f"{order[-1]}: focus is seen"
        page.keyboard.press("Tab")
    assert order[:4] == ["Skip to the message field", "new-chat", "open-settings", "scroll"], order
    assert "ask" in order and order.index("ask") < order.index("send")
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.type("Be brief.")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_settings_go_with_the_request(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    for name, value in (
        ("System prompt", "Be brief."),
        ("Temperature", "0.3"),
        ("Seed", "7"),
        ("Most tokens", "5"),
    ):
        page.get_by_label(name).fill(value)
    page.get_by_role("button", name="Done").click()
    with page.expect_request(CHAT) as asked:
        write(page, "Tell me a story.")
    body = json.loads(asked.value.post_data or "{}")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["seed"], body["max_tokens"], body["top_p"]) == (0.3, 7, 5, 1)
    expect(answer(page).locator(".note")).to_contain_text("5 tokens")
    expect(answer(page).locator(".note")).to_contain_text("cut")


def test_a_request_that_reads_one_that_answers_and_one_that_waits(browser: Browser, start: Any) -> None:
    with (
        start(scheduler=SchedulerSettings(max_num_seqs=1, max_num_batched_tokens=32)) as one,
        one.http() as http,
    ):
        one.slow_down(0.05)
        visit = Visit(browser, one.url)
        bars = visit.page.locator("#batch li")
        body = {"prompt": [[7] * 900, [8] * 20], "max_tokens": 30, "ignore_eos": True}
        asking = threading.Thread(target=lambda: http.post("/v1/completions", json=body))
        asking.start()
        expect(bars).to_have_count(2)
        expect(bars.nth(0)).to_have_text(re.compile(r"prefill \d+ of 900"))
        expect(bars.nth(1)).to_contain_text("waiting")
        expect(bars.nth(0)).to_contain_text(re.compile(r"decode \d+"))
        assert bars.nth(0).evaluate("bar => bar.querySelector('.part-made').offsetWidth") > 0
        expect(bars).to_have_count(0)
        asking.join()
        visit.context.close()
        assert not visit.wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_one_half_at_a_time(browser: Browser, slow: Running, scheme: Any) -> None:
    viewport: Any = {"width": 360, "height": 640}
    visit = Visit(browser, slow.url, viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    page = visit.page
    too_wide = "() => document.scrollingElement.scrollWidth > innerWidth"
    expect(page.get_by_label("Your message")).to_be_visible()
    assert not page.evaluate(too_wide)
    page.get_by_role("button", name="Engine").click()
    expect(page.get_by_label("Your message")).to_be_hidden()
    expect(page.locator("#map")).to_be_visible()
    assert not page.evaluate(too_wide)
    assert page.evaluate("document.getAnimations().length") == 0
    visit.context.close()
    assert not visit.wrong


def test_the_key_is_asked_for_and_kept_in_the_tab(browser: Browser, start: Any) -> None:
    with start(ServerSettings(api_keys=("a-secret",))) as one:
        visit = Visit(browser, one.url)
        page = visit.page
        dialog, field = page.get_by_role("dialog"), page.get_by_role("textbox", name="API key")
        expect(dialog).to_contain_text("needs an API key")
        field.fill("wrong")
        field.press("Enter")
        expect(dialog).to_contain_text("did not take this key")
        field.fill("a-secret")
        field.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#map-words")).to_contain_text("blocks")
        write(page, "What is 48 + 35?")
        expect(answer(page).locator(".note")).to_contain_text("tokens")
        page.reload()
        expect(page.locator("#state")).to_have_text("demo")
        kept = page.evaluate("[localStorage.length, document.cookie, location.href.includes('secret')]")
        assert kept == [0, "", False]
        visit.context.close()
        assert len(visit.wrong) == 2 and all("401" in what for what in visit.wrong)


def test_it_waits_while_the_model_is_loaded_and_comes_back_after_the_server(
    browser: Browser, start: Any, demo: Any
) -> None:
    may_load = threading.Event()

    def load() -> AsyncLLM:
        may_load.wait(20)
        return AsyncLLM(demo, engine=EngineSettings(kv_blocks=64))

    with start(load=load) as one:
        visit = Visit(browser, one.url)
        expect(visit.page.locator("#state")).to_have_text("loading …")
        may_load.set()
        expect(visit.page.locator("#state")).to_have_text("demo")
        expect(visit.page.locator("#live-state")).to_be_hidden()
    expect(visit.page.locator("#live-state")).to_contain_text("cannot be reached")
    visit.context.close()
