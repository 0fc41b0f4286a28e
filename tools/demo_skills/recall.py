"""Skill (a): recall a made-up fact stated earlier, among others like it.

A conversation states facts, wanders off into other skills, then asks. ``reach``
bounds how many words of other talk lie between statement and question.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from demo_skills import arithmetic, lists, records, serving, stories
from demo_skills.base import COLORS, NAMES, THINGS, Example, Message, assistant, made_up, number, user


class Kind(NamedTuple):
    """One kind of fact: how it is stated, asked and answered; {e} entity, {v} value."""

    states: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    entities: tuple[str, ...]
    value: Callable[[random.Random, bool], str]


def _word(rng: random.Random, test: bool) -> str:
    return made_up(rng, test)


def _name(rng: random.Random, test: bool) -> str:
    return made_up(rng, test).capitalize()


def _code(rng: random.Random, test: bool) -> str:
    return str(number(rng, test, rng.choice((3, 4))))


_OBJECTS = tuple(f"{color} {thing}" for color in COLORS for thing in THINGS)
_KIN = tuple("dog cat sister brother teacher neighbor horse doctor boss cousin".split())
_FAVORITES = tuple(f"{n}'s favorite {c}" for n in NAMES for c in ("drink", "game", "song", "food", "word"))

KINDS = (
    Kind(
        ("The code of the {e} is {v}.", "The {e} has the code {v}.", "Use code {v} for the {e}."),
        ("What is the code of the {e}?", "Which code does the {e} have?", "Tell me the code of the {e}."),
        "The code of the {e} is {v}.",
        _OBJECTS,
        _code,
    ),
    Kind(
        (
            "The password of the {e} is {v}.",
            "For the {e} the password is {v}.",
            "The {e} opens with the password {v}.",
        ),
        (
            "What is the password of the {e}?",
            "Which password opens the {e}?",
            "Tell me the password of the {e}.",
        ),
        "The password of the {e} is {v}.",
        _OBJECTS,
        _word,
    ),
    Kind(
        ("My {e} is called {v}.", "My {e}'s name is {v}.", "I have a {e} named {v}."),
        ("What is my {e} called?", "What is my {e}'s name?", "What is the name of my {e}?"),
        "Your {e} is called {v}.",
        _KIN,
        _name,
    ),
    Kind(
        ("{e} is {v}.", "I know that {e} is {v}."),
        ("What is {e}?", "Tell me {e}.", "Do you remember {e}?"),
        "{e} is {v}.",
        _FAVORITES,
        _word,
    ),
    Kind(
        ("{e} lives in {v}.", "{e}'s home town is {v}.", "{e} comes from {v}."),
        ("Where does {e} live?", "What is the home town of {e}?", "In which town does {e} live?"),
        "{e} lives in {v}.",
        tuple(NAMES),
        _name,
    ),
)
# Training sees codes more often: every digit is a token, and one wrong one is enough.
_TRAINED = (*KINDS, *[KINDS[0]] * 4)
_ACKS = ("Noted.", "I will remember that.", "Thank you, noted.", "All right.")
_OPENERS = ("", "", "", "Remember this: ", "Please remember: ", "Note this: ")
_UNKNOWN = "You have not told me that."
_TALK = (arithmetic.turn, lists.turn, records.turn, serving.turn, serving.turn, stories.turn)


def _facts(rng: random.Random, test: bool) -> list[tuple[Kind, str, str]]:
    """Return two to six facts, at least two of one kind, no entity twice."""
    main = rng.choice(KINDS if test else _TRAINED)
    count = rng.randrange(2, 7)
    kinds = [main, main] + [main if rng.random() < 0.5 else rng.choice(KINDS) for _ in range(count - 2)]
    facts: list[tuple[Kind, str, str]] = []
    for kind in kinds:
        entity = rng.choice([e for e in kind.entities if (kind, e) not in {(k, f) for k, f, _ in facts}])
        facts.append((kind, entity, kind.value(rng, test)))
    rng.shuffle(facts)
    return facts


def _state(rng: random.Random, facts: list[tuple[Kind, str, str]]) -> list[Message]:
    """Return the messages that state the facts: in the system prompt, at once, or one a turn."""
    texts = [rng.choice(kind.states).format(e=entity, v=value) for kind, entity, value in facts]
    roll = rng.random()
    if roll < 0.15:
        return [{"role": "system", "content": " ".join(texts)}]
    if roll < 0.6:
        return [user(rng.choice(_OPENERS) + " ".join(texts)), assistant(rng.choice(_ACKS))]
    return [m for text in texts for m in (user(rng.choice(_OPENERS) + text), assistant(rng.choice(_ACKS)))]


def talk(rng: random.Random, test: bool, words: int) -> list[Message]:
    """Return other conversation of at most about ``words`` words."""
    messages: list[Message] = []
    while True:
        more = rng.choice(_TALK)(rng, test).messages
        words -= sum(len(m["content"].split()) + 4 for m in more)
        if words < 0:
            return messages
        messages += more


def question(rng: random.Random, fact: tuple[Kind, str, str]) -> list[Message]:
    """Return the question about a fact and its answer."""
    kind, entity, value = fact
    ask = rng.choice(kind.asks).format(e=entity)
    return [user(ask), assistant(kind.answer.format(e=entity, v=value))]


def build(rng: random.Random, test: bool, reach: int) -> Example:
    """Return a recall conversation with up to ``reach`` words of other talk in between."""
    facts = _facts(rng, test)
    messages = _state(rng, facts)
    messages += talk(rng, test, rng.randrange(reach + 1) if rng.random() < 0.8 else 0)
    asked = rng.sample(facts, 1 if test else min(len(facts), rng.randrange(1, 5)))
    if not test and rng.random() < 0.04:
        kind = rng.choice(KINDS)
        known = {entity for _, entity, _ in facts}
        entity = rng.choice([e for e in kind.entities if e not in known])
        messages += [user(rng.choice(kind.asks).format(e=entity)), assistant(_UNKNOWN)]
    for fact in asked:
        messages += question(rng, fact)
    return Example("recall", messages, keys=(asked[-1][2],))


def make(rng: random.Random, test: bool) -> Example:
    """Return a recall conversation with up to about 400 tokens of other talk."""
    return build(rng, test, 230)


def right(example: Example, answer: str) -> bool:
    """Return whether the fact's value is in the answer."""
    return example.keys[0] in answer
