"""Skill (f): call a tool in the Qwen2.5 format, then use what it returned."""

import json
import random
from typing import Any

from demo_skills.base import NAMES, THINGS, Example, Message, assistant, made_up, number, user
from demo_skills.serving import turn as serving_turn

_ATTRIBUTES = "population height price age weight owner color capital score length speed address".split()


def _schema(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


CALCULATOR = _schema("calculator", "Compute an arithmetic expression.", "expression", "For example 12 * 7.")
LOOKUP = _schema("lookup", "Look up a fact.", "query", "What to look up.")


def call_text(name: str, arguments: dict[str, str]) -> str:
    """Return the text of a tool call as the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def _calculation(rng: random.Random, test: bool) -> tuple[str, str, str, str]:
    a, b = number(rng, test, rng.choice((2, 3, 3, 4))), number(rng, test, rng.choice((2, 3)))
    op = rng.choice("+-*")
    expression = f"{a} {op} {b}"
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    ask = rng.choice(("What is {q}?", "Compute {q}.", "How much is {q}?", "Calculate {q}", "{q}"))
    return ask.format(q=expression), expression, str(result), f"{expression} = {result}"


def _fact(rng: random.Random, test: bool) -> tuple[str, str, str, str]:
    attribute = rng.choice(_ATTRIBUTES)
    subject = rng.choice((rng.choice(NAMES), made_up(rng, test).capitalize(), f"the {rng.choice(THINGS)}"))
    value = rng.choice((str(number(rng, test, rng.choice((2, 3, 4)))), made_up(rng, test)))
    query = f"{attribute} of {subject}"
    ask = rng.choice(
        ("What is the {q}?", "Look up the {q}.", "Tell me the {q}.", "Find the {q}", "Do you know the {q}?")
    )
    return ask.format(q=query), query, value, f"The {query} is {value}."


def turns(rng: random.Random, test: bool, tools: list[dict[str, Any]]) -> list[Message]:
    """Return question, tool call, tool's answer and final answer for one of ``tools``."""
    if rng.choice(tools) is CALCULATOR:
        ask, argument, result, final = _calculation(rng, test)
        call = call_text("calculator", {"expression": argument})
    else:
        ask, argument, result, final = _fact(rng, test)
        call = call_text("lookup", {"query": argument})
    return [user(ask), assistant(call), {"role": "tool", "content": result}, assistant(final)]


def make(rng: random.Random, test: bool) -> Example:
    """Return a conversation with tools, a test's ending at the call or after it.

    In training some questions need no tool.
    """
    tools = rng.choice(([CALCULATOR, LOOKUP], [LOOKUP, CALCULATOR], [CALCULATOR], [LOOKUP]))
    if test:
        whole = turns(rng, test, tools)
        return Example("toolcalls", whole if rng.random() < 0.5 else whole[:2], tools)
    messages: list[Message] = []
    for _ in range(rng.randrange(1, 5)):
        messages += serving_turn(rng, test).messages if rng.random() < 0.12 else turns(rng, test, tools)
    return Example("toolcalls", messages, tools)


def right(example: Example, answer: str) -> bool:
    """Return whether the answer is the expected text: a call, or the sentence that uses its result."""
    return answer.strip() == example.messages[-1]["content"]
