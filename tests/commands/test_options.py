"""An option is declared once, and reaches the command line, a file's lines, the server and the library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tiny_llm import cli
from tiny_llm.commands import bench, chat, generate, serve
from tiny_llm.commands.talking import ANSWER
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import RequestError
from tiny_llm.options import EngineOptions
from tiny_llm.sampling_params import OPTIONS, SamplingParams
from tiny_llm.server.bodies import ELSEWHERE
from tiny_llm.server.chat_bodies import ChatBody
from tiny_llm.server.params import params_of
from tiny_llm.server.response_bodies import ResponseBody
from tiny_llm.server.text_bodies import CompletionBody, GenerateBody

OTHERWISE: Mapping[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.25,
    "min_p": 0.125,
    "seed": 11,
    "stop": ["end", "stop"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "logprobs": 2,
    "n": 2,
    "min_tokens": 1,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"5": -1.5},
}
"""For each option that all fronts have, as JSON, what it is not by default."""


class Recorder:
    """Stands for a model; remembers the params of what it is asked."""

    memory = ""
    config = SimpleNamespace(vocab_size=512)

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []
        self.engine = SimpleNamespace(trace=None, settings=EngineSettings(kv_blocks=16))

    def stream_chat(self, messages: object, params: SamplingParams) -> Iterator[object]:
        self.asked.append(params)
        return iter(())

    def chat_prompt(self, messages: object) -> list[int]:
        return [1]

    def check(self, ids: list[int], params: SamplingParams) -> tuple[list[int], SamplingParams]:
        self.asked.append(params)
        return ids, params

    def answers(self, requests: object) -> Iterator[object]:
        return iter(())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(generate, "load", lambda options: recorder)
    return recorder


def test_each_option_has_its_example() -> None:
    assert [*OTHERWISE, "prompt_logprobs"] == sorted(
        OPTIONS, key=lambda name: (name == "prompt_logprobs", [*OPTIONS].index(name))
    ), "a new option needs a line in OTHERWISE, and then is tried in all fronts"


def arguments(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    return [word for one in values for word in (flag, str(one))]


@pytest.mark.parametrize("name", OTHERWISE)
def test_an_option_reaches_every_front(name: str, recorder: Recorder, tmp_path: Path) -> None:
    value = OTHERWISE[name]
    expected = replace(ANSWER, **{name: value})
    assert getattr(expected, name) != getattr(ANSWER, name), "the example is the default"
    assert cli.main(["generate", "-p", "Hi", "--json", *arguments(name, value)]) == 0
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", name: value}))
    assert cli.main(["generate", "--file", str(file)]) == 0
    body = GenerateBody.model_validate({"prompt": "Hi", "max_tokens": ANSWER.max_tokens, name: value})
    served = params_of(
        recorder,  # type: ignore[arg-type]
        body,
        [[1]],
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
    )
    assert [*recorder.asked, served] == [expected] * 3


def test_the_server_leaves_alone_what_is_not_asked_for() -> None:
    body = GenerateBody.model_validate({"prompt": "Hi"})
    served = params_of(Recorder(), body, [[1]], max_tokens=256, logprobs=None)  # type: ignore[arg-type]
    assert served == SamplingParams(), "its neutral values are the library's"


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, GenerateBody, ResponseBody])
def test_every_way_of_asking_the_server_has_the_options(body: type[ChatBody]) -> None:
    assert set(OPTIONS) - set(ELSEWHERE) <= body.model_fields.keys()


@pytest.mark.parametrize("command", [chat, generate, serve, bench])
def test_every_command_that_makes_an_engine_has_the_engine_s_options(command: Any) -> None:
    shown = {parameter.name for parameter in typer.main.get_command(command.app).params}
    assert {field.name for field in fields(EngineOptions)} <= shown


def test_a_value_out_of_range_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for more, complaint in [
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0, but must be above 0, 1 meaning off."),
        (["--logit-bias", "[5]"], "'[5]' is not an object of JSON, such as {\"50\": -100}."),
        (
            ["--logit-bias", '{"x": 1}'],
            "logit_bias is {'x': 1}, but must be a mapping of token ids to numbers.",
        ),
        (["--n", "2"], "--n and --logprobs need --json or --file: plain text shows one answer alone."),
    ]:
        assert cli.main(["generate", "-p", "Hi", *more]) == 2
        assert capsys.readouterr().err == f"error: {complaint}\n"


NOT_OPENAI_S = sorted(set(OPTIONS) - set(ELSEWHERE) - {"temperature", "top_k", "seed", "stop", "logit_bias"})
ANY_VALUE = st.one_of(
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.floats(-3, 3),
    st.text(max_size=3),
    st.lists(st.integers(-1, 2**32), max_size=3),
)


@pytest.mark.parametrize("name", NOT_OPENAI_S)
@given(value=ANY_VALUE)
def test_the_server_takes_what_the_library_takes(name: str, value: object) -> None:
    """Random values of all kinds: an option that is declared once cannot have two ranges."""

    def taken(make: Callable[[], object]) -> bool:
        try:
            make()
        except (RequestError, ValidationError):
            return False
        return True

    library = taken(lambda: SamplingParams(**{name: value}))  # type: ignore[arg-type]
    server = taken(lambda: GenerateBody.model_validate({"prompt": "Hi", name: value}))
    assert library == server, f"{name}={value!r}: library {library}, server {server}"
