"""Owns POST /generate, /tokenize and /detokenize: our own short ways to text and token ids."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Chunk, Completion
from tiny_llm.server.answers import logprob, usage
from tiny_llm.server.bodies import DetokenizeBody, GenerateBody, TokenizeBody
from tiny_llm.server.events import ResponseWriter, answered, event_of
from tiny_llm.server.params import chat_ids, grammar_of, job_of, params_of, prompt_ids, require_model
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Job, Service, aside

DEFAULT_TOKENS = 256


async def generate(service: Service, request: Request, body: GenerateBody) -> Response:
    """Answer one request: the engine's own view of it, token ids included."""
    require_model(body.model, service.settings.name)
    grammar, job = await aside(request, lambda: (grammar_of(body), _job(service, request, body)))
    job = await service.constrained(job, grammar)
    return await answered(service, request, job, GenerateWriter(), stream=body.stream)


def _job(service: Service, request: Request, body: GenerateBody) -> Job:
    llm = service.llm
    prompts = prompt_ids(llm, body.prompt)
    most = body.max_tokens or DEFAULT_TOKENS
    params = params_of(llm, body, prompts, max_tokens=most, logprobs=body.logprobs)
    return job_of(body, prompts, params, request.state.salt)


class GenerateWriter(ResponseWriter):
    """POST /generate's words."""

    def whole(self, answers: Sequence[Sequence[Chunk]]) -> dict[str, object]:
        """All answers, and what they took."""
        ended = [one for chunks in answers if (one := chunks[-1].completion) is not None]
        told = [self._told(index, completion) for index, completion in enumerate(ended)]
        return {"answers": told, "usage": usage(ended)}

    def events(self, index: int, chunk: Chunk) -> bytes:
        """One event a chunk; the last one says all that there is to say of the answer."""
        ended = {} if chunk.completion is None else self._told(index, chunk.completion)
        return event_of({"index": index, **ended, "text": chunk.text, "token_ids": list(chunk.token_ids)})

    def closing(self, ended: Sequence[Completion]) -> bytes:
        """Nothing: each answer's last event said it."""
        return b""

    def _told(self, index: int, completion: Completion) -> dict[str, object]:
        rows = completion.logprobs
        return {
            "index": index,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(completion.prompt_token_ids),
            "cached_tokens": completion.cached_tokens,
            "ttft_s": round(completion.timing.ttft_s, 6),
            "logprobs": rows and [{str(i): logprob(value) for i, value in row.items()} for row in rows],
        }


def tokenize(service: Service, body: TokenizeBody) -> dict[str, object]:
    """A text's or a conversation's token ids."""
    require_model(body.model, service.settings.name)
    if (body.prompt is None) == (not body.messages):
        raise Problem(400, "Give either prompt or messages.", code="invalid_value", param="prompt")
    llm = service.llm
    if body.messages:
        ids = chat_ids(llm, body.messages, body.chat_template_kwargs)
    else:
        assert body.prompt is not None
        ids = llm.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    return {"count": len(ids), "max_model_len": llm.max_context, "tokens": ids}


def detokenize(service: Service, body: DetokenizeBody) -> dict[str, object]:
    """Token ids' text."""
    require_model(body.model, service.settings.name)
    llm = service.llm
    size = llm.config.vocab_size
    if any(token >= size for token in body.tokens):
        what = f"tokens: {max(body.tokens)} is not in the vocabulary, which is 0 to {size - 1}."
        raise Problem(400, what, code="invalid_value", param="tokens")
    text = llm.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return {"prompt": text}
