"""Skill (d): a short story on request, about the animal and the thing asked for."""

import random

from demo_skills.base import ANIMALS, COLORS, NAMES, THINGS, Example, assistant, draw, user, vary

_ASK = (
    "Tell me a short story about {a} and {t}.",
    "Write a short story about {a} and {t}.",
    "Tell me a story with {a} and {t} in it.",
    "I want a story about {a} and {t}.",
    "A short story, please: {a} and {t}.",
)
_ASK_ANIMAL = (
    "Tell me a short story about {a}.",
    "Write a story about {a}.",
    "Tell me a story about {a}, please.",
)
_ASK_ANY = ("Tell me a story.", "Tell me a short story.", "Write a short story.")

_TRAITS = "small shy brave clever lazy curious old kind hungry quiet proud cheerful".split()
_HOMES = (
    "at the edge of a forest",
    "by a wide river",
    "under an old oak",
    "near the sea",
    "on a green hill",
    "behind the mill",
    "in a sleepy village",
    "beside a deep lake",
)
_WISHES = (
    "wanted to see the world",
    "could not sleep",
    "was looking for a friend",
    "had lost the way home",
    "wished for some music",
    "hoped for a surprise",
    "was tired of the rain",
    "was afraid of the dark",
)
_FINDS = (
    "One morning {n} found {t} in the grass.",
    "One evening {n} saw {t} near the path.",
    "After a storm, {t} lay in front of the door.",
    "On a cold day {n} came upon {t} in the snow.",
    "In the market {n} was given {t} by a stranger.",
)
_TROUBLES = (
    'A {b} came by and said, "That is mine!"',
    'A {b} stopped and asked, "May I have it?"',
    "Then a {b} fell into the water nearby.",
    "Soon a {b} came running, quite out of breath.",
    "A {b} sat next to it and cried.",
)
_TURNS = (
    "{n} thought for a while and decided to share.",
    "{n} was not sure what to do, but chose to help.",
    "{n} laughed and offered half of the bread.",
    "At first {n} wanted to run, but then stayed.",
    "So {n} told the truth, and the {b} smiled.",
)
_ENDS = (
    "From that day on they were friends.",
    "They went home together under the stars.",
    "And the {x} was kept by both of them.",
    "That night {n} slept better than ever.",
    "In the end everyone in the place knew about the {x}.",
    "And {n} never felt alone again.",
)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _write(rng: random.Random, animal: str, thing: str, color: str) -> str:
    name, other = rng.choice(NAMES), rng.choice([a for a in ANIMALS if a != animal])
    found = f"{_article(color)} {thing}"
    lines = [
        f"Once there was {_article(rng.choice(_TRAITS))} {animal} called {name}, "
        f"who lived {rng.choice(_HOMES)}.",
        f"{name} {rng.choice(_WISHES)}.",
        rng.choice(_FINDS),
        rng.choice(_TROUBLES),
        rng.choice(_TURNS),
        rng.choice(_ENDS),
    ]
    story = (
        " ".join(lines).replace("{n}", name).replace("{t}", found).replace("{b}", other).replace("{x}", thing)
    )
    return story.replace(f"a {other}", _article(other)).replace(f"A {other}", _article(other).capitalize())


def turn(rng: random.Random, test: bool) -> Example:
    """Return a request and a story; in training sometimes with less asked for."""
    animal, thing = draw(rng, test, lambda: (rng.choice(ANIMALS), rng.choice(THINGS)))
    color = rng.choice(COLORS)
    roll = 0.0 if test else rng.random()
    if roll < 0.65:
        ask, keys = rng.choice(_ASK).format(a=_article(animal), t=_article(thing)), (animal, thing)
    elif roll < 0.9:
        ask, keys = rng.choice(_ASK_ANIMAL).format(a=_article(animal)), (animal,)
    else:
        ask, keys = rng.choice(_ASK_ANY), ()
    return Example("stories", [user(vary(rng, ask)), assistant(_write(rng, animal, thing, color))], keys=keys)


def make(rng: random.Random, test: bool) -> Example:
    """Return one request and its story."""
    return turn(rng, test)


def right(example: Example, answer: str) -> bool:
    """Return whether the answer is at least four whole sentences about what was asked for."""
    sentences = answer.count(". ") + answer.count('!" ') + answer.count('?" ') + 1
    return (
        answer.rstrip().endswith(".") and sentences >= 4 and all(f" {key}" in answer for key in example.keys)
    )
