"""Skill (e): a described record as a JSON object."""

import json
import random
from collections.abc import Callable

from demo_skills.base import COLORS, NAMES, PLACES, THINGS, Example, assistant, made_up, number, user

_ASK = (
    "Write this as JSON: {x}",
    "Make a JSON object: {x}",
    "Give me JSON for this record: {x}",
    "Turn this into JSON. {x}",
    "JSON please: {x}",
)
Record = dict[str, object]


def _person(rng: random.Random, test: bool) -> tuple[Record, list[str]]:
    name, place = rng.choice(NAMES), rng.choice((rng.choice(PLACES), made_up(rng, test).capitalize()))
    age = number(rng, test, 2)
    record: Record = {"name": name, "age": age, "city": place}
    texts = [
        f"{name} is {age} years old and lives in {place}.",
        f"{name}, aged {age}, from {place}.",
        f"A person called {name}, age {age}, city {place}.",
    ]
    return record, texts


def _product(rng: random.Random, test: bool) -> tuple[Record, list[str]]:
    product, color = rng.choice(THINGS), rng.choice(COLORS)
    price = number(rng, test, rng.choice((2, 3)))
    stock = rng.random() < 0.5
    record: Record = {"product": product, "color": color, "price": price, "in_stock": stock}
    have = "in stock" if stock else "not in stock"
    texts = [
        f"The {color} {product} costs {price} and is {have}.",
        f"A {color} {product}, price {price}, {have}.",
        f"We sell a {color} {product} for {price}; it is {have}.",
    ]
    return record, texts


def _book(rng: random.Random, test: bool) -> tuple[Record, list[str]]:
    title = f"The {rng.choice(COLORS).capitalize()} {rng.choice(THINGS).capitalize()}"
    author, year = f"{rng.choice(NAMES)} {made_up(rng, test).capitalize()}", number(rng, test, 4)
    record: Record = {"title": title, "author": author, "year": year}
    texts = [
        f"{title} was written by {author} in {year}.",
        f"The book {title}, by {author}, from {year}.",
        f"{author} wrote {title} in {year}.",
    ]
    return record, texts


def _order(rng: random.Random, test: bool) -> tuple[Record, list[str]]:
    ident, count = number(rng, test, 4), rng.randrange(2, 10)
    items = rng.sample(THINGS, rng.choice((1, 2, 3)))
    record: Record = {"order": ident, "items": items, "quantity": count}
    joined = " and ".join(items)
    texts = [
        f"Order {ident} has {count} of each: {joined}.",
        f"Order number {ident}: {joined}, quantity {count}.",
    ]
    return record, texts


_KINDS: tuple[Callable[[random.Random, bool], tuple[Record, list[str]]], ...] = (
    _person,
    _product,
    _book,
    _order,
)


def turn(rng: random.Random, test: bool) -> Example:
    """Return one description and its JSON object."""
    record, texts = rng.choice(_KINDS)(rng, test)
    ask = rng.choice(_ASK).format(x=rng.choice(texts))
    return Example("records", [user(ask), assistant(json.dumps(record))])


def make(rng: random.Random, test: bool) -> Example:
    """Return a conversation of one record (test) or a few (training)."""
    turns = 1 if test else rng.randrange(1, 4)
    return Example("records", [m for _ in range(turns) for m in turn(rng, test).messages])


def parses(answer: str) -> bool:
    """Return whether the answer is one JSON object."""
    try:
        return isinstance(json.loads(answer), dict)
    except ValueError:
        return False


def right(example: Example, answer: str) -> bool:
    """Return whether the answer parses to the expected record."""
    return parses(answer) and json.loads(answer) == json.loads(example.messages[-1]["content"])
