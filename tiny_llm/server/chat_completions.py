"""Owns POST /v1/chat/completions: a conversation's next message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tiny_llm.data import Chunk, Completion
from tiny_llm.engine.llm import LLM
from tiny_llm.messages.chat_format import ChatFormat
from tiny_llm.messages.message import message_of
from tiny_llm.server.answers import delta_json, message_json
from tiny_llm.server.chat_bodies import ChatBody, NamedTool
from tiny_llm.server.completions import ChoiceWriter
from tiny_llm.server.jobs import Job
from tiny_llm.server.logprobs import LogprobWriter
from tiny_llm.server.params import chat_ids, grammar_of, job_of, params_of
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Service


def chat(service: Service, body: ChatBody, key_salt: str) -> tuple[Job, ChatWriter]:
    """What a request asks of the engine, and who writes the response."""
    form, job = chat_job(service.llm, body, key_salt)
    return job, ChatWriter(service, body, form, job)


def chat_job(llm: LLM, body: ChatBody, key_salt: str, *, cut: bool = False) -> tuple[ChatFormat, Job]:
    """How a chat's answers are read, and what it asks of the engine.

    With ``cut``, an answer may be asked for that is longer than there is room for.

    Raises Problem or RequestError for what cannot be asked.
    """
    if body.top_logprobs and not body.logprobs:
        what = "top_logprobs needs logprobs to be true."
        raise Problem(400, what, code="invalid_value", param="top_logprobs")
    form, prompt, at = chat_prompt(llm, body)
    prompts = [prompt]
    most = body.max_completion_tokens or body.max_tokens
    if cut and most is not None and len(prompt) + most > llm.max_context:
        most = None
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=logprobs)
    if body.prediction is not None:
        # What is beyond the longest answer would only have to be read.
        text = body.prediction.content[: params.max_tokens * llm.tokenizer.longest_token]
        expected = llm.tokenizer.encode(text, add_special_tokens=False)
        params = replace(params, prediction=tuple(expected))
    return form, job_of(body, prompts, form.params(params), key_salt, form.grammar, at)


def chat_prompt(llm: LLM, body: ChatBody) -> tuple[ChatFormat, list[int], int]:
    """How a chat's answers are read, its prompt, and where in that contexts are to stand."""
    choice = body.tool_choice
    form = ChatFormat.of(
        llm.tokenizer,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools],
        tool_choice=choice.model_dump() if isinstance(choice, NamedTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        grammar=grammar_of(body),
    )
    asked = (body.messages, body.chat_template_kwargs, form.tools, body.reasoning_effort)
    prompt, at = chat_ids(llm, *asked, contexts=bool(body.contexts))
    return form.after(llm.tokenizer, prompt), prompt, at


class ChatWriter(ChoiceWriter):
    """/v1/chat/completions' words."""

    def __init__(self, service: Service, body: ChatBody, form: ChatFormat, job: Job) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(service, body.stream_options, job, kind=kind, prefix="chatcmpl")
        self._with_logprobs = body.logprobs
        self._logprobs = LogprobWriter(service.llm.tokenizer, body.top_logprobs or 0)
        self._parsers = [form.parser() for _ in range(body.n)]

    def _whole_choice(self, index: int, chunks: Sequence[Chunk], ended: Completion) -> dict[str, object]:
        parser = self._parsers[index]
        deltas = parser.push("".join(chunk.text for chunk in chunks)) + parser.finish()
        rows = [row for chunk in chunks for row in chunk.logprobs or ()]
        return {"index": index, "message": message_json(message_of(deltas)), **self._rest(index, rows, ended)}

    def _text_choice(self, index: int, text: str) -> dict[str, object]:
        return self._choice(index, {"content": text}, (), None)

    def _told(self, index: int, chunk: Chunk, is_first: bool) -> str | list[dict[str, object]]:
        """Who speaks, then what is said, an event a delta; the last of a chunk has its log-probabilities."""
        found = self._parsers[index].push(chunk.text)
        is_text_alone = chunk.completion is None and not chunk.logprobs
        if is_text_alone and not is_first and len(found) == 1 and found[0].content:
            return found[0].content
        if chunk.completion is not None:
            found += self._parsers[index].finish()
        deltas = [delta_json(delta) for delta in found]
        if not deltas and not is_text_alone:
            deltas = [{}]  # its end, or its log-probabilities, are to be told
        if is_first:
            deltas.insert(0, {"role": "assistant", "content": ""})
        told = [self._choice(index, delta, (), None) for delta in deltas[:-1]]
        last = [self._choice(index, delta, chunk.logprobs or (), chunk.completion) for delta in deltas[-1:]]
        return told + last

    def _choice(
        self, index: int, delta: dict[str, Any], rows: Sequence[dict[int, float]], ended: Completion | None
    ) -> dict[str, object]:
        return {"index": index, "delta": delta, **self._rest(index, rows, ended)}

    def _rest(
        self, index: int, rows: Sequence[dict[int, float]], ended: Completion | None
    ) -> dict[str, object]:
        """What a choice has beside its message: log-probabilities, and why it ended if it has."""
        told = {"content": self._logprobs.chat(rows), "refusal": None} if self._with_logprobs else None
        reason: str | None = None if ended is None else ended.finish_reason
        if reason == "stop" and self._parsers[index].calls:
            reason = "tool_calls"
        return {"logprobs": told, "finish_reason": reason}
