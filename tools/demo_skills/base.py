"""What every skill shares: the example type, word lists, and the train/test split.

Owns no task. A made-up word, a pair of numbers or a pairing of story parts is
held out when its checksum says so, so training and test never share one.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

NAMES = (
    "Ada Ben Carla Dan Ella Finn Gina Hugo Iris Jack Kara Leo Mona Nils Olga Pete Quinn Rosa Sam Tina "
    "Udo Vera Will Xena Yuri Zoe Anna Bob Cleo Dora Emil Frida Gus Hana Ivan Jana Karl Lena Max Nora"
).split()
THINGS = (
    "lamp box door boat garden tower bridge clock drawer bag book kite piano lantern window cabin barn "
    "wagon statue mirror basket robot ladder chair kettle blanket hammer wheel ship tent"
).split()
COLORS = "red blue green yellow black white purple orange silver golden brown pink".split()
ANIMALS = "fox owl bear cat dog mouse frog rabbit horse duck wolf crow goat hedgehog turtle otter".split()
PLACES = "Oslo Rome Lima Cairo Paris Tokyo Delhi Quito Bern Dublin Porto Riga Sofia Tunis Hanoi Perth".split()

_ONSETS = "b d f g k l m n p r s t v z br dr gr kr pl st tr sh ch".split()
_VOWELS = "a e i o u".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "x", "k", "m"]


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the assistant's right answer."""

    skill: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    keys: tuple[str, ...] = field(default=())


Maker = Callable[[random.Random, bool], Example]


def held_out(text: str) -> bool:
    """Return whether ``text`` belongs to the test side: one in eight, by checksum."""
    return zlib.crc32(text.encode()) % 8 == 0


def draw(rng: random.Random, test: bool, make: Callable[[], Any]) -> Any:
    """Draw from ``make`` until the value is on the wanted side of the split."""
    while True:
        value = make()
        if held_out(str(value)) == test:
            return value


def made_up(rng: random.Random, test: bool) -> str:
    """Return a pronounceable word that means nothing, such as 'zopar'."""

    def word() -> str:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))]
        return "".join(parts) + rng.choice(_CODAS)

    return str(draw(rng, test, word))


def number(rng: random.Random, test: bool, digits: int) -> int:
    """Return a number of ``digits`` digits from the wanted side of the split."""
    return int(draw(rng, test, lambda: rng.randrange(10 ** (digits - 1), 10**digits)))


def user(text: str) -> Message:
    """Return a user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an assistant message."""
    return {"role": "assistant", "content": text}


def vary(rng: random.Random, text: str) -> str:
    """Return the question as a hasty person might type it, meaning unchanged."""
    roll = rng.random()
    if roll < 0.12:
        text = text[:1].lower() + text[1:]
    if roll < 0.06 or roll > 0.94:
        text = text.rstrip("?.")
    if 0.2 < roll < 0.26:
        text = "Please: " + text
    return text
