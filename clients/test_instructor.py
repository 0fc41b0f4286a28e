"""instructor, as its documentation uses it: models out of tool calls and JSON, streams of parts, retries."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field, field_validator

ASKED: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 400, "max_retries": 0}
DRAW = [{"role": "user", "content": "Draw."}]
# Not Mode.JSON (JSON of any form) nor Iterable (nothing is required): too much for the bundled model.
MODES = [
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
    instructor.Mode.RESPONSES_TOOLS,
]
PARTS = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA]


class Point(BaseModel, extra="forbid"):
    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


class Shape(BaseModel, extra="forbid"):
    """A shape on a grid."""

    name: str = Field(max_length=9)
    kind: Literal["square", "circle"]
    corner: Point
    others: list[Point] = Field(max_length=2)


def patched(url: str, mode: instructor.Mode) -> Any:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_nested_model_comes_out(url: str, mode: instructor.Mode) -> None:
    shape, answer = patched(url, mode).chat.completions.create_with_completion(
        messages=DRAW, response_model=Shape, **ASKED
    )
    assert isinstance(shape, Shape) and answer.usage.total_tokens > 0

    async def ask() -> Any:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        async with client:
            made = instructor.from_openai(client, mode=mode)
            return await made.chat.completions.create(messages=DRAW, response_model=Shape, **ASKED)

    assert asyncio.run(ask()).model_dump() == shape.model_dump()


@pytest.mark.parametrize("mode", PARTS)
def test_parts_come_as_they_are_made(url: str, mode: instructor.Mode) -> None:
    parts = list(patched(url, mode).create_partial(messages=DRAW, response_model=Shape, **ASKED))
    assert len(parts) > 3 and Shape.model_validate(parts[-1].model_dump()), parts[-1]


@pytest.mark.parametrize("mode", PARTS)
def test_a_list_of_models(url: str, mode: instructor.Mode) -> None:
    made = patched(url, mode).create(messages=DRAW, response_model=list[Point], **ASKED)
    assert all(isinstance(one, Point) for one in made)


@pytest.mark.parametrize("mode", MODES)
def test_what_it_asks_again_is_taken(url: str, mode: instructor.Mode) -> None:
    """Its history of a retry: the call, then a result that tells the fault."""
    seen: list[int] = []

    class Picky(BaseModel, extra="forbid"):
        x: int = Field(ge=0, le=9)

        @field_validator("x")
        @classmethod
        def second_time_only(cls, x: int) -> int:
            seen.append(x)
            if len(seen) == 1:
                raise ValueError("say it again")
            return x

    made = patched(url, mode).create(messages=DRAW, response_model=Picky, **{**ASKED, "max_retries": 2})
    assert made.x == seen[-1] and len(seen) == 2


def test_errors_are_openais(url: str, guarded: str) -> None:
    asked = {"response_model": Point, **ASKED}
    with pytest.raises(InstructorRetryException, match="Incorrect API key"):
        patched(guarded, instructor.Mode.TOOLS).create(messages=DRAW, **asked)
    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(InstructorRetryException, match="maximum context length"):
        patched(url, instructor.Mode.TOOLS).create(messages=long, **asked)
