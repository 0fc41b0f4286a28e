"""Skill (g): repeat or reverse a list."""

import random
import string

from demo_skills.base import ANIMALS, COLORS, NAMES, THINGS, Example, assistant, made_up, number, user

_REPEAT = ("Repeat: {x}", "Repeat this list: {x}", "Say this back to me: {x}", "Copy this: {x}")
_REVERSE = (
    "Reverse: {x}",
    "Reverse this list: {x}",
    "Say this list backwards: {x}",
    "Reverse the order: {x}",
)


def _items(rng: random.Random, test: bool) -> list[str]:
    count = rng.randrange(2, 9)
    kind = rng.randrange(5)
    if kind == 0:
        return rng.sample(THINGS + ANIMALS + COLORS, count)
    if kind == 1:
        return rng.sample(NAMES, count)
    if kind == 2:
        return [str(number(rng, test, rng.choice((1, 2, 3)) if not test else 3)) for _ in range(count)]
    if kind == 3:
        return rng.sample(string.ascii_lowercase, count)
    return [made_up(rng, test) for _ in range(count)]


def turn(rng: random.Random, test: bool) -> Example:
    """Return one list to repeat or to reverse, and the result."""
    items = _items(rng, test)
    joiner = rng.choice((", ", ", ", " "))
    reverse = rng.random() < 0.6
    ask = rng.choice(_REVERSE if reverse else _REPEAT).format(x=joiner.join(items))
    return Example("lists", [user(ask), assistant(joiner.join(items[::-1] if reverse else items))])


def make(rng: random.Random, test: bool) -> Example:
    """Return a conversation of one list (test) or a few (training)."""
    turns = 1 if test else rng.randrange(1, 5)
    return Example("lists", [m for _ in range(turns) for m in turn(rng, test).messages])


def right(example: Example, answer: str) -> bool:
    """Return whether the list came back exactly."""
    return answer.strip() == example.messages[-1]["content"]
