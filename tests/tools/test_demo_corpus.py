"""The demo model's corpus: repeatable, split cleanly, and rendered as the chat template renders it."""

import itertools
import random
from pathlib import Path

import pytest
from demo_corpus import SKILLS, examples, render, windows
from demo_skills import recall, serving
from demo_skills.base import held_out

from tiny_llm.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_calls_its_own_answer_right_and_an_empty_one_wrong(name: str) -> None:
    rng = random.Random(3)
    for _ in range(50):
        example = SKILLS[name].make(rng, True)
        assert SKILLS[name].right(example, example.messages[-1]["content"]), example
        assert not SKILLS[name].right(example, ""), example


def test_the_stream_is_the_same_for_the_same_seed_and_other_for_another() -> None:
    first, again, other = (list(itertools.islice(examples(seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.slow
def test_training_never_shows_a_held_out_value_and_a_test_shows_no_other() -> None:
    rng = random.Random(5)
    for test in (False, True):
        values = [value for _ in range(200) for value in recall.build(rng, test, 0).keys]
        assert {held_out(value.lower()) for value in values} == {test}, "a value on the wrong side"


def test_training_never_asks_a_serving_question_in_its_held_out_wording() -> None:
    rng = random.Random(5)
    kept = {entry["questions"][-1] for entry in serving.entries()}
    asked = {serving.turn(rng, False).messages[0]["content"] for _ in range(5000)}
    assert not asked & kept


def test_serving_has_150_questions_in_several_wordings_each_with_its_own() -> None:
    entries = serving.entries()
    wordings = [question for entry in entries for question in entry["questions"]]
    assert len(entries) >= 150
    assert min(len(entry["questions"]) for entry in entries) >= 4
    assert len(set(wordings)) == len(wordings), "two entries share a wording"
    for entry in entries:
        missing = [key for key in entry["keys"] if key.lower() not in entry["answer"].lower()]
        assert not missing, f"{entry['topic']}: the answer lacks its own key words {missing}"


def test_render_is_the_chat_template_of_the_bundled_model(demo: Path) -> None:
    tokenizer = Tokenizer.from_folder(demo)
    for example in itertools.islice(examples(seed=4), 200):
        expected = tokenizer.render_chat(example.messages, tools=example.tools, add_generation_prompt=False)
        assert render(example.messages, example.tools) == expected


def test_windows_hold_whole_conversations_and_are_nearly_full() -> None:
    packed = itertools.islice(windows(examples(seed=6), lambda text: [0] * len(text), 3000), 20)
    fills = [sum(map(len, window)) for window in packed]
    assert max(fills) <= 3000
    assert sum(fills) / len(fills) > 0.9 * 3000
