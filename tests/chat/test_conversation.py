"""A conversation remembers what was said, and goes on fitting the context."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from tiny_llm.chat.conversation import Conversation
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.chapter("1.6")

TALK = SamplingParams(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True)


def say(conversation: Conversation, text: str, params: SamplingParams = TALK) -> str:
    return "".join(chunk.text for chunk in conversation.ask(text, params))


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


def test_turns_are_remembered_and_reset_forgets_them(llm: LLM) -> None:
    conversation = Conversation(llm, system="Be brief.")
    first = say(conversation, "Hello")
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
    ]
    said = llm.chat([*conversation.messages, {"role": "user", "content": "And then?"}], TALK).text
    assert say(conversation, "And then?") == said, "the model must see the earlier turns"
    conversation.reset()
    assert roles(conversation) == ["system"]


def test_an_answer_stopped_early_is_remembered_as_far_as_it_went(llm: LLM) -> None:
    conversation = Conversation(llm)
    chunks = conversation.ask("Hello", TALK)
    heard = "".join(chunk.text for chunk in islice(chunks, 4))
    chunks.close()
    assert heard and conversation.messages[-1] == {"role": "assistant", "content": heard}


def test_a_stop_before_the_first_character_takes_the_question_back(llm: LLM) -> None:
    conversation = Conversation(llm)
    say(conversation, "Hello")
    first = llm.chat([*conversation.messages, {"role": "user", "content": "More"}], TALK).text[0]
    assert (
        say(conversation, "More", SamplingParams(temperature=1.0, seed=1, ignore_eos=True, stop=(first,)))
        == ""
    )
    assert roles(conversation) == ["user", "assistant"]


def test_an_answer_closed_before_it_began_takes_the_question_back(llm: LLM) -> None:
    conversation = Conversation(llm)
    conversation.ask("Hello", TALK).close()
    assert conversation.messages == []


def test_oldest_turns_go_when_the_context_is_full() -> None:
    llm = LLM("demo", max_context=96)
    conversation = Conversation(llm, system="Be brief.")
    questions = [f"Question {number}: what is {number} + {number}?" for number in range(5)]
    for question in questions:
        assert say(conversation, question)
        assert len(llm.chat_prompt(conversation.messages)) <= 96
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert roles(conversation)[1:] == ["user", "assistant"] * (len(conversation.messages) // 2)
    assert conversation.messages[-2]["content"] == questions[-1]
    assert conversation.forgotten == 2 * len(questions) - len(conversation.messages[1:]) > 0


def test_a_message_that_cannot_fit_changes_nothing() -> None:
    conversation = Conversation(LLM("demo", max_context=64))
    say(conversation, "Hello")
    before = conversation.messages
    with pytest.raises(RequestError, match="maximum context length is 64"):
        conversation.ask("word " * 200, TALK)
    assert conversation.messages == before and conversation.forgotten == 0


def test_save_writes_json_and_never_over_a_file(llm: LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm)
    say(conversation, "Grüße")
    conversation.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == conversation.messages
    with pytest.raises(FileExistsError):
        conversation.save(tmp_path / "talk.json")


def test_what_a_terminal_sent_as_half_a_character_is_saved_too(llm: LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm, system="caf\udce9")
    conversation.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == conversation.messages


def test_a_model_without_a_template_cannot_converse(stories260k: Path) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*--raw"):
        Conversation(LLM(stories260k))


def test_retry_replaces_the_last_answer_once_it_has_begun(llm: LLM) -> None:
    conversation = Conversation(llm)
    with pytest.raises(RequestError, match="Nothing was asked yet"):
        conversation.retry(TALK)
    say(conversation, "Hello")
    say(conversation, "And then?")
    before = conversation.messages
    conversation.retry(TALK).close()
    assert conversation.messages == before, "it had not begun"
    other = SamplingParams(max_tokens=8, temperature=4.0, seed=2, ignore_eos=True)
    second = "".join(chunk.text for chunk in conversation.retry(other))
    assert conversation.messages == [*before[:-1], {"role": "assistant", "content": second}]
    assert second != before[-1]["content"]


def test_what_was_saved_is_loaded(llm: LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm, system="Be brief.")
    say(conversation, "Grüße\u2028\n/")
    conversation.save(tmp_path / "talk.json")
    other = Conversation(llm)
    other.load(tmp_path / "talk.json")
    assert other.messages == conversation.messages and other.system == "Be brief."
    Conversation(llm).save(tmp_path / "empty.json")
    other.load(tmp_path / "empty.json")
    assert other.messages == [] and other.system is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[{]", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("{}", "holds no list"),
        ("[1]", "message 1: expected"),
        ('[{"role": "assistant", "content": "a"}]', 'message 1: expected {"role": "user"'),
        ('[{"role": "system", "content": "s"}, {"role": "system", "content": "s"}]', "message 2: expected"),
        ('[{"role": "user", "content": null}]', "message 1: expected"),
        ('[{"role": "user", "content": "a"}]', "ends with a question"),
    ],
)
def test_what_is_no_saved_conversation_changes_nothing(
    llm: LLM, tmp_path: Path, text: str, complaint: str
) -> None:
    conversation = Conversation(llm, system="Be brief.")
    (tmp_path / "talk.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match=complaint):
        conversation.load(tmp_path / "talk.json")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
