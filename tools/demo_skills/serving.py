"""Skill (c): questions about LLM serving, from the table in demo_data/serving_qa.toml.

The last wording of each question is held out.
"""

import random
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from demo_skills.base import Example, assistant, user, vary

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
    return ask(entry, vary(rng, rng.choice(entry["questions"][:-1])))


def make(rng: random.Random, test: bool) -> Example:
    """Return a conversation of one question (test) or a few (training)."""
    if test:
        return turn(rng, test)
    return Example("serving", [m for _ in range(rng.randrange(1, 5)) for m in turn(rng, test).messages])


def right(example: Example, answer: str) -> bool:
    """Return whether every key word of the right answer is there."""
    return all(key.lower() in answer.lower() for key in example.keys)
