"""What is kept in the browser, and what can be done with what was said: over reloads, with no store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.page.visit import CHAT, Visit, answer, ended, saying, write

if TYPE_CHECKING:
    from tests.server.conftest import Running

pytestmark = pytest.mark.slow
KEPT = "() => Object.keys(localStorage).filter((key) => key.startsWith('tiny_llm.chat.')).length"


def say(page: Page, question: str, text: str) -> None:
    """Ask ``question`` and have it answered by ``text``."""
    page.unroute(CHAT)
    saying(page, text)
    write(page, question)
    ended(page)
    expect(answer(page).locator(".text").last).to_have_text(text)


def opened(page: Page) -> Any:
    """The list of chats, opened."""
    page.get_by_role("button", name="Chats").click()
    return page.locator("#chat-list li")


def texts(page: Page) -> list[str]:
    """What was said, both sides of it."""
    shown = page.locator(".message.user > p, .message.assistant > .text")
    return [text.strip() for text in shown.all_inner_texts()]


def test_a_conversation_outlives_a_reload_and_goes_on(visit: Visit) -> None:
    page = visit.page
    saying(page, "<think>Is it?</think>First **answer**.")
    write(page, "One?")
    ended(page)
    say(page, "Two?", "Second.")
    note = answer(page).locator(".note").inner_text()
    page.reload()
    expect(page.locator(".message").nth(1).locator(".thought")).to_contain_text("Is it?")
    expect(page.locator(".message strong")).to_have_text("answer")
    assert texts(page) == ["One?", "First answer.", "Two?", "Second."]
    expect(answer(page).locator(".note")).to_have_text(note)
    page.unroute(CHAT)
    with page.expect_request(CHAT) as asked:
        write(page, "Three?")
    said = json.loads(asked.value.post_data or "{}")["messages"]
    assert [message["content"] for message in said] == [
        "One?",
        "First **answer**.",
        "Two?",
        "Second.",
        "Three?",
    ]
    assert all(set(message) == {"role", "content"} for message in said)
    ended(page)


def test_a_reload_in_mid_answer_keeps_what_there_is(visit: Visit) -> None:
    page = visit.page
    saying(page, "on and on " * 200)
    write(page, "Go on.")
    expect(answer(page).locator(".text").last).to_contain_text("on and on")
    page.reload()
    expect(answer(page).locator(".text").last).to_contain_text("on and on")
    expect(answer(page).locator(".note")).to_contain_text("stopped")
    page.get_by_role("button", name="Answer again").click()
    ended(page)
    expect(page.locator(".message")).to_have_count(2)


def test_a_question_without_an_answer_can_be_answered_after_a_reload(visit: Visit) -> None:
    page = visit.page
    page.route(CHAT, lambda route: route.abort())
    write(page, "What is 48 + 35?")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    visit.wrong.clear()
    page.unroute(CHAT)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("not answered")
    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_contain_text("first after")
    assert texts(page)[0] == "What is 48 + 35?" and len(texts(page)) == 2


def test_earlier_chats_are_listed_opened_named_and_deleted(visit: Visit) -> None:
    page = visit.page
    say(page, "First question", "one")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    say(page, "Second question", "two")
    other = visit.context.new_page()
    other.goto("/")
    expect(other.locator("#state")).to_have_text("demo")
    assert texts(other) == [], "a new tab begins a new chat"
    other.close()

    entries = opened(page)
    assert [text.split("\n")[0] for text in entries.all_inner_texts()] == [
        "Second question",
        "First question",
    ]
    expect(entries.first.locator(".open")).to_have_attribute("aria-current", "true")
    entries.last.hover()
    entries.last.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the chat").fill("<b>My</b> chat")
    page.keyboard.press("Enter")
    expect(entries.last.locator("span")).to_have_text("<b>My</b> chat")
    entries.last.hover()
    entries.last.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the chat").fill("no")
    page.keyboard.press("Escape")
    expect(entries.last.locator("span")).to_have_text("<b>My</b> chat")
    entries.last.locator(".open").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert texts(page) == ["First question", "one"]

    entries = opened(page)
    entries.last.hover()
    entries.last.get_by_role("button", name="Delete").click()
    expect(entries).to_have_count(2)
    entries.last.get_by_role("button", name="Delete it?").click()
    expect(entries).to_have_count(1)
    page.get_by_role("button", name="Close").click()
    assert texts(page) == [], "what is deleted is not shown"
    opened(page)
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("button", name="Delete all chats?").click()
    expect(page.locator("#chats-words")).to_contain_text("No chat is kept")
    assert page.evaluate(KEPT) == 0
    page.reload()
    expect(page.get_by_role("heading", name="Ask it something, and watch it work.")).to_be_visible()


def test_a_chat_that_is_deleted_while_it_is_answered_stays_deleted(visit: Visit) -> None:
    page = visit.page
    saying(page, "on and on " * 60)
    write(page, "Go on.")
    expect(answer(page).locator(".text").last).to_contain_text("on and on")
    entries = opened(page)
    entries.first.hover()
    entries.first.get_by_role("button", name="Delete").click()
    entries.first.get_by_role("button", name="Delete it?").click()
    expect(entries).to_have_count(0)
    page.get_by_role("button", name="Close").click()
    expect(page.locator(".message")).to_have_count(0)
    assert page.evaluate(KEPT) == 0


def test_another_tab_s_words_are_shown(visit: Visit) -> None:
    page = visit.page
    say(page, "First question", "one")
    other = visit.context.new_page()
    other.goto("/")
    opened(other).first.locator(".open").click()
    expect(other.locator(".message")).to_have_count(2)
    say(other, "Second question", "two")
    expect(page.locator(".message")).to_have_count(4)
    assert texts(page)[-1] == "two"
    other.close()


@pytest.mark.parametrize("store", ["localStorage", "both"])
def test_a_forbidden_store_costs_what_would_be_kept_and_not_the_page(
    browser: Browser, slow: Running, store: str
) -> None:
    names = ["localStorage", "sessionStorage"] if store == "both" else [store]
    visit = Visit(
        browser,
        slow.url,
        before="".join(
            f"Object.defineProperty(window, '{name}', "
            "{ get() { throw new DOMException('forbidden', 'SecurityError'); } });"
            for name in names
        ),
    )
    page = visit.page
    expect(page.locator("#state")).to_have_text("demo")
    say(page, "One?", "first")
    say(page, "Two?", "second")
    assert texts(page) == ["One?", "first", "Two?", "second"]
    expect(page.locator("#not-kept")).to_be_visible()
    assert opened(page).count() == 0
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#not-kept")).to_be_hidden()
    visit.context.close()
    assert not visit.wrong


def test_a_full_store_drops_the_oldest_chats_and_then_says_so(visit: Visit) -> None:
    page = visit.page
    for number in range(3):
        say(page, f"Question {number}", "x" * 40)
        page.get_by_role("button", name="New chat").click()
    page.evaluate(
        """() => {
            for (let size = 2 ** 20; size >= 1; size /= 2) {
                try {
                    for (let i = 0; ; i++) localStorage.setItem(`filler${size}.${i}`, "x".repeat(size));
                } catch {}
            }
        }"""
    )
    say(page, "Question 3", "x" * 40)
    expect(page.locator("#not-kept")).to_be_hidden()
    titles = [text.split("\n")[0] for text in opened(page).all_inner_texts()]
    assert titles[0] == "Question 3" and "Question 0" not in titles and len(titles) >= 2, titles
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Your message").fill("long " * 200)
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }; }"
    )
    say(page, "Is this kept?", "no")
    expect(page.locator("#not-kept")).to_contain_text("not kept")


def test_what_is_kept_is_bounded(visit: Visit) -> None:
    kept = visit.page.evaluate(
        """async () => {
            const { chats, newChat } = await import("/page/store.js");
            const said = (size) => [{ role: "user", content: "x".repeat(size) }];
            const chat = (at, size) => ({ ...newChat(), at, messages: said(size) });
            for (let at = 0; at < 230; at++) chats.save(chat(at, 10));
            const many = chats.all();
            for (let at = 1000; at < 1010; at++) chats.save(chat(at, 300_000));
            const large = chats.all();
            return [
                many.length, many[0].at, many.at(-1).at,
                large.length, large[0].at, JSON.stringify(large).length < 2_100_000,
                chats.save(chat(2000, 3_000_000)), chats.all().length === large.length,
            ];
        }"""
    )
    assert kept == [200, 229, 30, 6, 1009, True, False, True]


BAD = [
    "",
    "{",
    "null",
    "[]",
    '"text"',
    '{"id": "bad"}',
    '{"id": "other", "title": "", "at": 1, "messages": []}',
    '{"id": "bad", "title": 5, "at": 1, "messages": []}',
    '{"id": "bad", "title": "", "at": "now", "messages": []}',
    '{"id": "bad", "title": "", "at": 1, "messages": {}}',
    '{"id": "bad", "title": "", "at": 1, "messages": [null]}',
    '{"id": "bad", "title": "", "at": 1, "messages": [{"role": "system", "content": "x"}]}',
    '{"id": "bad", "title": "", "at": 1, "messages": [{"role": "user", "content": {}}]}',
]


def test_what_others_left_in_the_store_is_passed_over(visit: Visit) -> None:
    page = visit.page
    say(page, "Mine", "yes")
    taken = page.evaluate(
        """async (all) => {
            const { chats, tab } = await import("/page/store.js");
            const read = all.map((text) => {
                localStorage.setItem("tiny_llm.chat.bad", text);
                return [chats.get("bad"), chats.all().length];
            });
            sessionStorage.setItem("tiny_llm.shown", "bad");
            sessionStorage.setItem("tiny_llm.settings", all[1]);
            return [read, JSON.stringify(tab.fields("tiny_llm.settings"))];
        }""",
        BAD,
    )
    assert taken == [[[None, 1]] * len(BAD), "{}"]
    page.reload()
    expect(page.locator("#state")).to_have_text("demo")
    assert opened(page).count() == 1


def test_a_message_is_edited_and_sent_again(visit: Visit) -> None:
    page = visit.page
    say(page, "One?", "first")
    say(page, "Two?", "second")
    first = page.locator(".message.user").first
    first.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edit your message")
    expect(field).to_have_value("One?")
    expect(field).to_be_focused()
    page.keyboard.press("Escape")
    assert texts(page) == ["One?", "first", "Two?", "second"]
    first.get_by_role("button", name="Edit").click()
    field.fill("One\nand a half?")
    page.unroute(CHAT)
    with page.expect_request(CHAT) as asked:
        page.get_by_role("button", name="Send again").click()
    assert json.loads(asked.value.post_data or "{}")["messages"] == [
        {"role": "user", "content": "One\nand a half?"}
    ]
    ended(page)
    assert texts(page)[0] == "One\nand a half?" and len(texts(page)) == 2
    page.reload()
    assert texts(page)[0] == "One\nand a half?" and len(texts(page)) == 2


def test_the_last_answer_is_made_again(visit: Visit) -> None:
    page = visit.page
    say(page, "One?", "first")
    say(page, "Two?", "second")
    expect(page.get_by_role("button", name="Answer again")).to_have_count(1)
    page.unroute(CHAT)
    saying(page, "better")
    with page.expect_request(CHAT) as asked:
        page.get_by_role("button", name="Answer again").click()
    ended(page)
    said = json.loads(asked.value.post_data or "{}")["messages"]
    assert [message["content"] for message in said] == ["One?", "first", "Two?"]
    assert texts(page) == ["One?", "first", "Two?", "better"]


@pytest.mark.parametrize("way", ["clipboard", "selection"])
def test_messages_and_code_are_copied_as_they_were_written(browser: Browser, slow: Running, way: str) -> None:
    none = "Object.defineProperty(navigator, 'clipboard', { value: undefined });"
    visit = Visit(browser, slow.url, before=none if way == "selection" else "")
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.page
    text = "Some **bold** words.\n\n```python\nif a < b:\n    print('x')\n```"
    saying(page, text)
    write(page, "  Show\nme <code>.")
    ended(page)
    field = page.get_by_label("Your message")
    for button, expected in (
        (page.locator(".message.user").get_by_role("button", name="Copy"), "  Show\nme <code>."),
        (answer(page).locator(".tools").get_by_role("button", name="Copy"), text),
        (answer(page).locator("figure").get_by_role("button", name="Copy"), "if a < b:\n    print('x')"),
    ):
        button.click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        expect(page.get_by_role("button", name="Copied")).to_be_focused()
        field.fill("")
        field.press("Control+V")
        expect(field).to_have_value(expected)
        field.fill("")
        expect(page.get_by_role("button", name="Copied")).to_have_count(0)
    visit.context.close()
    assert not visit.wrong
