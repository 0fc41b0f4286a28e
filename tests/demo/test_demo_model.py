"""The bundled model and its draft: their sizes, and the seven skills on held-out prompts.

The thresholds stand near what the model reaches (tools/demo_score.py prints its scores
on more prompts); decoding is greedy, so a score repeats.
"""

from pathlib import Path

import pytest
from demo_score import score, share
from demo_skills.records import parses

from tiny_llm import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo")


def misses(answers: list) -> str:
    return "\n".join(f"{a.example.messages[-2]['content']!r} -> {a.answer!r}" for a in answers if not a.right)


def test_the_bundled_files_are_as_small_as_promised(demo: Path) -> None:
    main, draft = demo / "model.safetensors", demo / "draft" / "model.safetensors"
    assert main.stat().st_size <= 12_000_000
    assert draft.stat().st_size <= 1_500_000
    assert (demo / "tokenizer.json").read_bytes() == (demo / "draft" / "tokenizer.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("skill", "count", "least"),
    [
        ("recall", 40, 0.95),
        ("arithmetic", 100, 0.95),
        ("serving", 80, 0.9),
        ("stories", 10, 0.9),
        ("records", 60, 0.95),
        ("toolcalls", 40, 0.95),
        ("lists", 60, 0.95),
    ],
)
def test_skill(llm: LLM, skill: str, count: int, least: float) -> None:
    answers = score(llm, skill, count)
    assert share(answers) >= least, f"{skill}: {share(answers):.1%} right; wrong:\n{misses(answers)}"
    if skill == "records":
        assert sum(parses(a.answer) for a in answers) / len(answers) >= 0.98
    if skill == "recall":
        assert max(a.prompt_tokens for a in answers) >= 300, "no fact lay far back"


def test_an_answer_is_the_same_from_text_and_from_ids(llm: LLM) -> None:
    ids = llm.chat_prompt([{"role": "user", "content": "What is 21 + 34?"}])
    by_ids, by_chat = (
        llm.generate(ids, SamplingParams(max_tokens=16))[0],
        llm.chat([{"role": "user", "content": "What is 21 + 34?"}], SamplingParams(max_tokens=16)),
    )
    assert by_ids.token_ids == by_chat.token_ids
    assert by_ids.finish_reason == "stop"


def test_the_draft_speaks_the_same_tokens_and_knows_the_easy_half() -> None:
    draft = LLM("demo-draft")
    assert share(score(draft, "serving", 40)) >= 0.5
