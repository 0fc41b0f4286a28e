"""The page in a real browser, on a real server: what a reader does, and what a model must not do to one.

What the model says is chosen by the server's own grammars: the request is given a regex on its way.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, expect

from tests.server.page.visit import CHAT, Visit, answer, ended, saying, write
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server.conftest import Running

pytestmark = pytest.mark.slow

HOSTILE = """<img src=x onerror=alert(1)> <script>alert(2)</script> [one](javascript:alert(3)) \
[two](https://example.org/a) **bold** `<b>code</b>` ![three](http://127.0.0.1:9/x.png)

- first
- second

```html
<iframe src="http://127.0.0.1:9/"></iframe>
```"""


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
    expect(page.get_by_role("alert")).to_contain_text("maximum context length is 1024")
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
    for _ in range(12):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", f"{order[-1]}: focus is seen"
        page.keyboard.press("Tab")
    top = ["Skip to the message field", "open-chats", "new-chat", "open-settings", "scroll"]
    assert order[:11] == [*top, "Copy", "Edit", "Copy", "Answer again", "ask", "send"], order
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


def large_picture(now: int) -> dict[str, object]:
    """A picture of an engine that has served for long, and serves long prompts."""
    row = [1, 131_072, 64_000, 131_072 + 12_345, 262_144, 64_000, 12_345]
    return {
        "now": now,
        "block_size": 16,
        "blocks": {
            "capacity": 1_234_567,
            "limit": 2_345_678,
            "used": 1_200_000,
            "cached": 34_000,
            "free": 567,
        },
        "cells": base64.b64encode(bytes(range(256)) * 16).decode(),
        "rows": [[10_000 + number, *row] for number in range(24)],
        "running": 12_024,
        "waiting": 34_567,
        "steps": 123_456_789,
        "prompt_tokens": 987_654_321 + 123_456 * now,
        "generation_tokens": 23_456 * now,
        "decodes": 12_345 * now,
        "drafted_tokens": {"prediction": 98_765 * now, "draft": 87_654 * now},
        "accepted_tokens": {"prediction": 98_765 * now, "draft": 0},
        "first_tokens": 10 + now,
        "ttft_s": 123.4 * (10 + now),
        "hit_tokens": 1_234_567_890,
        "miss_tokens": 123_456_789,
        "preempted": 54_321,
    }


def test_large_numbers_have_room_on_a_phone(browser: Browser, slow: Running) -> None:
    """From 10,000 tokens on, what a request does ran over its bar and out of the card."""
    visit = Visit(browser, slow.url, viewport={"width": 360, "height": 740})
    page = visit.page
    feed = "".join(f"data: {json.dumps(large_picture(now))}\n\n" for now in range(8))
    page.route("**/live", lambda route: route.fulfill(content_type="text/event-stream", body=feed))
    page.get_by_role("button", name="Engine").click()
    page.reload()
    page.get_by_role("button", name="Engine").click()
    expect(page.locator("#batch li").first).to_contain_text("prefill 64,000 of 131,072")
    expect(page.locator("#figures")).to_contain_text("23,456")
    expect(page.locator("#figures")).to_contain_text("9.00for each request")
    expect(page.locator("#figures")).to_contain_text("53 %prediction 100 %, draft 0 %")
    beyond = page.evaluate(
        """() => {
            const right = (one) => one.getBoundingClientRect().right;
            const places = "#figures :is(dd, dt), .card :is(p, h2, button, li > span)";
            const words = document.querySelectorAll(places);
            const runsOut = (one) => one.scrollWidth > one.clientWidth + 1
                || right(one) > right(one.closest(".card, #figures > div"));
            return Array.from(words).filter(runsOut).map((one) => one.textContent);
        }"""
    )
    assert not beyond, "words that run out of their place"
    bar, name, what = (
        page.locator(f"#batch li:first-child .{part}").bounding_box() for part in ("bar", "name", "what")
    )
    assert bar and name and what
    assert name["x"] + name["width"] <= bar["x"] and bar["x"] + bar["width"] <= what["x"]
    assert bar["width"] > 40, "there is something of the bar to be seen"
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
        kept = page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href].join()")
        assert "What is 48 + 35?" in kept and "secret" not in kept
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
