"""Skill (c): questions about LLM serving, from the table in demo_data/serving_qa.toml.

The last wording of each question is held out.
"""

import random
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from demo_skills.base import Example, assistant, user, vary

_SMALL = frozenset(
    "a an the is are do does did what why how when which of to for in on with it i we you".split()
)
_STOCK = (
    "{T}: what is it?",
    "{T}: what does it do?",
    "{T}: why?",
    "{T}: how does it work?",
    "{T}: what is it for?",
    "What about {t}?",
    "{T}?",
    "Tell me about {t}.",
    "Explain {t}.",
    "In short, {t}?",
)
_TABLE = Path(__file__).parent.parent / "demo_data" / "serving_qa.toml"


@cache
def entries() -> list[dict[str, Any]]:
    """Return the table's entries: topic, questions, answer, keys."""
    table: list[dict[str, Any]] = tomllib.loads(_TABLE.read_text())["qa"]
    return table


def ask(entry: dict[str, Any], question: str) -> Example:
    """Return the example of one wording of an entry."""
    return Example("serving", [user(question), assistant(entry["answer"])], keys=tuple(entry["keys"]))


def turn(rng: random.Random, test: bool) -> Example:
    """Return a question in a wording of the wanted side, and its answer."""
    entry = rng.choice(entries())
    if test:
        return ask(entry, entry["questions"][-1])
    question = _worded(rng, entry)
    while question == entry["questions"][-1]:
        question = _worded(rng, entry)
    return ask(entry, question)


def _worded(rng: random.Random, entry: dict[str, Any]) -> str:
    """Return the question as written, with small words lost, or made from the topic and a stock phrase.

    The last two teach the model to go by the words that matter.
    """
    written, roll = rng.choice(entry["questions"][:-1]), rng.random()
    if roll < 0.45:
        return vary(rng, written)
    if roll < 0.7:
        kept = [w for w in written.split() if w.lower() not in _SMALL or rng.random() < 0.5]
        return vary(rng, " ".join(kept))
    topic = entry["topic"].replace("-", " ")
    if roll < 0.85:
        return vary(rng, rng.choice(_STOCK).format(t=topic, T=topic[:1].upper() + topic[1:]))
    subject = topic[:1].upper() + topic[1:]
    return vary(rng, f"{subject}: {written[:1].lower()}{written[1:]}")


def make(rng: random.Random, test: bool) -> Example:
    """Return a conversation of one question (test) or a few (training)."""
    if test:
        return turn(rng, test)
    return Example("serving", [m for _ in range(rng.randrange(1, 5)) for m in turn(rng, test).messages])


def right(example: Example, answer: str) -> bool:
    """Return whether every key word of the right answer is there."""
    return all(key.lower() in answer.lower() for key in example.keys)
