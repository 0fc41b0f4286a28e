"""Owns who proposes the next action: our own engine, under a grammar, or any server that speaks as OpenAI."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

from tiny_llm.agent.action import FINISH, Actions
from tiny_llm.agent.history import Proposal, RunHistory, RunStep, Turn, turns
from tiny_llm.data import Completion
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, TinyLLMError
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.sampling_params import SamplingParams

_MOST_ANSWER_BYTES, _BYTES_A_TOKEN = 2**24, 3


class EngineModel:
    """Our own engine. Its grammar leaves only actions that are valid, and text.

    Actions are calls of tools where the chat template shows them and its tokens tell a call's beginning;
    else an answer is one object of JSON.
    """

    def __init__(self, llm: LLM, actions: Actions, params: SamplingParams) -> None:
        self._llm, self._actions, self._params = llm, actions, params
        self._calls = actions.calls() if _shows_calls(llm, actions) else None
        self.room = llm.max_context - min(params.max_tokens, llm.max_context // 4)

    def size(self, history: RunHistory) -> int:
        """The prompt's tokens."""
        return len(self._llm.chat_prompt(self._messages(history), tools=self._calls))

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        """The next action, drawn."""
        schema = {"type": "json_schema", "json_schema": {"schema": self._actions.schema()}}
        chunks = self._llm.stream_chat(
            self._messages(history),
            self._params,
            tools=self._calls,
            parallel_tool_calls=False,
            response_format=None if self._calls else schema,
        )
        deadline, tokens, done = time.monotonic() + seconds, 0, None
        for chunk in chunks:
            tokens, done = tokens + len(chunk.token_ids), chunk.completion
            if done is None and time.monotonic() > deadline:
                chunks.close()
                return Proposal(None, "", "the time was over", tokens=tokens)
        assert done is not None, "a stream ends with the whole"
        return self._read(done)

    def _read(self, done: Completion) -> Proposal:
        message, timing = done.message, done.timing
        assert message is not None, "a chat has one"
        said = (message.content or "").strip()
        counts = (timing.prompt_tokens, timing.completion_tokens, done.cached_tokens)
        if done.finish_reason == "length":
            return Proposal(None, done.text, "it was cut at --max-tokens", *counts)
        if not self._calls:
            return _from_json(said, *counts)
        for call in message.tool_calls:
            return Proposal({"name": call.name, "arguments": json.loads(call.arguments)}, said, "", *counts)
        return Proposal(None, said, "" if said else "nothing was said", *counts)

    def _messages(self, history: RunHistory) -> list[Turn]:
        return turns(history, None if self._calls else self._actions)


class ServerModel:
    """A server that speaks OpenAI's /v1/chat/completions; ``url`` ends before "/chat".

    It is asked to keep to a JSON schema; what it says is checked. Raises ConfigError if it is of no use.
    """

    def __init__(
        self, url: str, model: str, key: str, actions: Actions, params: SamplingParams, room: int
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--server is {url!r}, but must be like http://localhost:8000/v1.")
        self._url, self._key = f"{url.rstrip('/')}/chat/completions", key
        self._actions, self.room = actions, room
        form = {"name": "action", "schema": actions.schema(), "strict": all(t.checked for t in actions.tools)}
        self._body = {
            "model": model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "response_format": {"type": "json_schema", "json_schema": form},
        }

    def size(self, history: RunHistory) -> int:
        """Guessed: a token has 3 bytes or more."""
        return len(json.dumps(turns(history, self._actions))) // _BYTES_A_TOKEN

    def propose(self, history: RunHistory, seconds: float) -> Proposal:
        """The next action, checked."""
        body = json.dumps({**self._body, "messages": turns(history, self._actions)}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=max(1.0, seconds)) as response:
                told = json.loads(response.read(_MOST_ANSWER_BYTES))
            said, usage = told["choices"][0]["message"]["content"] or "", told.get("usage") or {}
            cut = told["choices"][0].get("finish_reason") == "length"
        except urllib.error.HTTPError as error:
            why = error.read(2000).decode(errors="replace")
            raise ConfigError(f"{self._url} refused: {error.code} {error.reason}: {why}") from error
        except TimeoutError:
            return Proposal(None, "", "the time was over")
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"{self._url} gave no answer as OpenAI's are: {error}") from error
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        counts = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), cached)
        if cut:
            return Proposal(None, said, "it was cut at --max-tokens", *counts)
        return _from_json(said, *counts)


def _shows_calls(llm: LLM, actions: Actions) -> bool:
    tools = actions.calls()
    if not tools:
        return False
    tried = RunStep({"name": tools[0]["function"]["name"], "arguments": {}}, "", "done", "")
    try:
        ChatFormat.of(llm.tokenizer, tools=tools, parallel_tool_calls=False)
        llm.chat_prompt(turns(RunHistory("?").with_step(tried)), tools=tools)
    except TinyLLMError:
        return False
    return True


def _from_json(text: str, *counts: int) -> Proposal:
    try:
        told = json.loads(text)
        thought, action = str(told["thought"]), told["action"]
        if action["name"] == FINISH:
            return Proposal(None, str(action["arguments"]["answer"]), "", *counts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Proposal(None, text, f"it is no JSON object with a thought and an action ({error})", *counts)
    return Proposal(action, thought, "", *counts)
