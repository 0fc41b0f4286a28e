"""Owns POST /generate, /tokenize, /detokenize, GET /tokenizer_info: our own short ways to text and ids."""

from __future__ import annotations

from collections.abc import Sequence

from tiny_llm.data import Chunk, Completion
from tiny_llm.server.answers import usage
from tiny_llm.server.events import ResponseWriter, event_of
from tiny_llm.server.jobs import Job
from tiny_llm.server.logprobs import by_id, token_text
from tiny_llm.server.params import chat_ids, prompts_job
from tiny_llm.server.problems import Problem
from tiny_llm.server.service import Service
from tiny_llm.server.text_bodies import DetokenizeBody, GenerateBody, TokenizeBody

DEFAULT_TOKENS = 256


def generation(service: Service, body: GenerateBody, key_salt: str) -> tuple[Job, GenerateWriter]:
    """What a request asks of the engine, and who writes the response."""
    job = prompts_job(service.llm, body, key_salt, body.max_tokens or DEFAULT_TOKENS)
    return job, GenerateWriter()


class GenerateWriter(ResponseWriter):
    """POST /generate's words: the engine's own view of an answer, token ids included."""

    asked_by = "prompt"

    def whole(self, answers: Sequence[Sequence[Chunk]], ended: Sequence[Completion]) -> dict[str, object]:
        """All answers, and what they took."""
        told = [self._told(index, completion) for index, completion in enumerate(ended)]
        return {"answers": told, "usage": usage(ended)}

    def events(self, index: int, chunk: Chunk) -> bytes:
        """One event a chunk; the last one says all that there is to say of the answer."""
        ended = {} if chunk.completion is None else self._told(index, chunk.completion)
        return event_of({"index": index, **ended, "text": chunk.text, "token_ids": list(chunk.token_ids)})

    def _told(self, index: int, completion: Completion) -> dict[str, object]:
        return {
            "index": index,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(completion.prompt_token_ids),
            "cached_tokens": completion.cached_tokens,
            "ttft_s": round(completion.timing.ttft_s, 6),
            "logprobs": None if completion.logprobs is None else by_id(completion.logprobs),
        }


def tokenize(service: Service, body: TokenizeBody) -> dict[str, object]:
    """A text's or a conversation's token ids."""
    service.require_model(body.model)
    if (body.prompt is None) == (not body.messages):
        raise Problem(400, "Give either prompt or messages.", code="invalid_value", param="prompt")
    llm = service.llm
    if body.prompt is None:
        ids, _ = chat_ids(llm, body.messages, body.chat_template_kwargs)
    else:
        ids = llm.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    return {"count": len(ids), "max_model_len": llm.max_context, "tokens": ids}


def detokenize(service: Service, body: DetokenizeBody) -> dict[str, object]:
    """Token ids' text."""
    service.require_model(body.model)
    llm = service.llm
    size = llm.config.vocab_size
    if any(token >= size for token in body.tokens):
        what = f"tokens: {max(body.tokens)} is not in the vocabulary, which is 0 to {size - 1}."
        raise Problem(400, what, code="invalid_value", param="tokens")
    text = llm.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return {"prompt": text}


def tokenizer_info(service: Service) -> dict[str, object]:
    """What a client that tokenizes by these routes needs (lm-eval): names of tokenizer_config.json."""
    tokenizer = service.llm.tokenizer
    first, ends = tokenizer.bos_id, sorted(tokenizer.eos_ids)
    return {
        "bos_token": None if first is None else token_text(tokenizer, first),
        "eos_token": token_text(tokenizer, ends[0]) if ends else None,
        "chat_template": tokenizer.chat_template or None,
        "model_max_length": service.llm.max_context,
    }
