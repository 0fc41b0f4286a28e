"""200 JSON schemas of many kinds, sixteen at a time, on a model of random weights: always valid."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import Completion
from tiny_llm.decoding.grammar import schema_grammar
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.registry import build, expected_tensors
from tiny_llm.ops.linear import pack
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.dummy import dummy_weights

pytestmark = pytest.mark.slow

Schema = dict[str, Any]
Maker = Callable[[random.Random, int], Schema]
KEYS = (
    "name",
    "größe",
    "名前",
    "a b",
    'quo"te',
    "back\\slash",
    "ключ",
    "🔑",
    "with-dash",
    "$dollar",
    "x" * 40,
    "",
)
PATTERNS = (
    "^[a-z]{2,5}$",
    "^(red|green)-[0-9]{3}$",
    "^[A-F0-9]{8}$",
    "^a?b+c{1,2}$",
    "^\\d{1,3}(\\.\\d{1,2})?$",
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname")
COUNT, BATCH = 200, 16


def text(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 6)}


def pattern(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def format_(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(FORMATS)}


def integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-2000, 1000)
    bounds = rng.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
    return {"type": "integer", bounds[0]: low, bounds[1]: low + rng.randrange(2, 5000)}


def multiple(rng: random.Random, depth: int) -> Schema:
    return {"type": "integer", "multipleOf": rng.choice((2, 5, 7)), "minimum": 0, "maximum": 1000}


def number(rng: random.Random, depth: int) -> Schema:
    low = round(rng.uniform(-10, 10), 1)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.choice((0.5, 3, 100)), 1)}


def choice(rng: random.Random, depth: int) -> Schema:
    values = ["red", 'say "hi"', "ü", 7, 2.5, True, None, {"a": [1]}, ["x", None]]
    return {"enum": rng.sample(values, rng.randrange(1, 6))}


def constant(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["fixed", 0, -1.5, False, None, {"k": "v"}, [1, [2]], "名\n\t"])}


def simple(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


def array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {
        "type": "array",
        "items": made(rng, depth - 1),
        "minItems": low,
        "maxItems": low + rng.randrange(3),
    }


def tuple_(rng: random.Random, depth: int) -> Schema:
    first = [made(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}


def object_(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(KEYS, rng.randrange(1, 5))
    required = [name for name in names if rng.random() < 0.6]
    own = {name: made(rng, depth - 1) for name in names}
    return {"type": "object", "properties": own, "required": required, "additionalProperties": False}


def open_object(rng: random.Random, depth: int) -> Schema:
    more = {"type": "integer", "minimum": 0, "maximum": 99}
    return {"type": "object", "properties": {"id": {"const": 1}}, "required": ["id"],
            "additionalProperties": more, "maxProperties": 3}  # fmt: skip


def either(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [made(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def both(rng: random.Random, depth: int) -> Schema:
    return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": rng.randrange(5, 500)}]}


def referring(rng: random.Random, depth: int) -> Schema:
    """Definitions, one of them used through another."""
    leaf = {"$ref": "#/$defs/leaf"}
    pair = {"type": "array", "prefixItems": [leaf, leaf], "items": False, "minItems": 2}
    return {
        "$defs": {"leaf": made(rng, 0), "pair": pair},
        "type": "object",
        "properties": {"one": leaf, "two": {"$ref": "#/$defs/pair"}},
        "required": ["one", "two"],
        "additionalProperties": False,
    }


def recursive(rng: random.Random, depth: int) -> Schema:
    tree = {
        "type": "object",
        "properties": {"v": made(rng, 0), "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}


FLAT: Sequence[Maker] = (text, pattern, format_, integer, multiple, number, choice, constant, simple, both)
DEEP: Sequence[Maker] = (array, tuple_, object_, object_, open_object, either)
WHOLE: Sequence[Maker] = (*FLAT, *DEEP, referring, recursive, object_, object_)


def made(rng: random.Random, depth: int) -> Schema:
    return rng.choice((*FLAT, *DEEP) if depth > 0 else FLAT)(rng, depth)


def schemas() -> list[Schema]:
    """Each kind in turn as the outermost, all of them different."""
    rng = random.Random(6)
    return [WHOLE[number % len(WHOLE)](rng, 3) for number in range(COUNT)]


@pytest.fixture(scope="module")
def wild() -> LLM:
    """The bundled model's shape and tokenizer, and weights that mean nothing."""
    llm = LLM("demo", engine=EngineSettings(kv_blocks=1024, scheduler=SchedulerSettings(max_num_seqs=BATCH)))
    shapes, finish = expected_tensors(llm.config), partial(pack, exact=False)
    weights = dummy_weights(shapes, dtype=mx.float32, quantize=None, quantizable=frozenset(), finish=finish)
    llm.engine.runner.model = build(llm.config, weights)
    return llm


def test_a_model_of_random_weights_is_always_valid(wild: LLM) -> None:
    asked = schemas()
    begun = {}
    for number, schema in enumerate(asked):
        constraint = wild.grammars.compile(schema_grammar(schema))
        params = SamplingParams(max_tokens=300, temperature=1.0, seed=number, constraint=constraint)
        begun[wild.engine.add([number % 2000 + 1] * 4, params)] = number
    ended: dict[int, Completion] = {}
    while len(wild.engine):
        assert wild.engine.scheduler.num_running <= BATCH
        for request, chunk in wild.engine.step():
            if chunk.completion is not None:
                ended[begun[request]] = chunk.completion
    whole = {n: one for n, one in ended.items() if one.finish_reason == "stop"}
    assert len(ended) == COUNT and all(one.finish_reason in ("stop", "length") for one in ended.values())
    assert len(whole) >= 0.9 * COUNT, "some may have run into max_tokens, not many"
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for number, one in whole.items():
        value = json.loads(one.text)
        jsonschema.Draft202012Validator(asked[number], format_checker=checker).validate(value)
