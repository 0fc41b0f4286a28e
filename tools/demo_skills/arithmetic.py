"""Skill (b): addition and subtraction of two-digit numbers, answered from the weights."""

import random

from demo_skills.base import Example, assistant, draw, user

_ASK = (
    "What is {q}?",
    "{q}",
    "{q} = ?",
    "Compute {q}.",
    "How much is {q}?",
    "Calculate {q}",
    "Please work out {q}.",
)
_WORDS = {
    "+": ("Add {a} and {b}.", "What is {a} plus {b}?", "What is the sum of {a} and {b}?"),
    "-": ("Subtract {b} from {a}.", "What is {a} minus {b}?", "How much is {a} take away {b}?"),
}


def problem(rng: random.Random, test: bool) -> tuple[int, str, int]:
    """Return (a, operator, b), two digits each (one digit now and then in training)."""

    def pick() -> tuple[int, str, int]:
        low = 1 if not test and rng.random() < 0.15 else 10
        a, b = rng.randrange(low, 100), rng.randrange(low, 100)
        op = rng.choice("+-")
        if op == "-" and a < b and rng.random() < 0.6:
            a, b = b, a
        return a, op, b

    drawn: tuple[int, str, int] = draw(rng, test, pick)
    return drawn


def turn(rng: random.Random, test: bool) -> Example:
    """Return one question and its answer, '47 + 38 = 85'."""
    a, op, b = problem(rng, test)
    result = a + b if op == "+" else a - b
    if rng.random() < 0.75:
        text = rng.choice(_ASK).format(q=f"{a} {op} {b}" if rng.random() < 0.8 else f"{a}{op}{b}")
    else:
        text = rng.choice(_WORDS[op]).format(a=a, b=b)
    return Example("arithmetic", [user(text), assistant(f"{a} {op} {b} = {result}")])


def make(rng: random.Random, test: bool) -> Example:
    """Return a conversation of one problem (test) or a few (training)."""
    turns = 1 if test else rng.randrange(1, 9)
    return Example("arithmetic", [m for _ in range(turns) for m in turn(rng, test).messages])


def right(example: Example, answer: str) -> bool:
    """Return whether the number after the last '=' is the expected one."""
    return answer.strip().rstrip(".").split("=")[-1] == example.messages[-1]["content"].split("=")[-1]
