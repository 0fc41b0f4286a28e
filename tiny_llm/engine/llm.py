"""Owns the library's front door: a model and its tokenizer, and requests answered one by one.

Checks a request before anything runs, and measures it. Refuses to know terminals,
HTTP, and where a checkpoint comes from.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tiny_llm.config import load_end_ids
from tiny_llm.data import Chunk, Completion, SamplingParams, Timing
from tiny_llm.decoding.generate import generate
from tiny_llm.decoding.stop import Answer
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.registry import load_model
from tiny_llm.ops.backend import active, choose, set_threads, use
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.checkpoint import Progress
from tiny_llm.weights.hub import resolve

Prompt = str | Sequence[int]
Message = Mapping[str, object]


class LLM:
    """A model that answers: ``LLM("qwen2-0.5b").generate(["..."])``.

    ``model`` is a short name, a repository id, a folder, or "demo", the bundled model.
    ``dtype`` is "float32", "bfloat16" or "float16"; None takes what suits the device.
    ``quantize`` 4 or 8 packs the matrices on loading. ``offline`` never asks the network.
    ``backend`` is "cpu" (our kernels) or "ref" (plain MLX); None takes the best there is.
    ``threads`` is how many the CPU kernels use, in the whole process; None leaves it as it is.
    ``activations`` "exact" keeps backend "cpu" from rounding what meets quantized matrices to 8 bits.
    ``max_context`` lowers the number of tokens that prompt and answer may have together.
    ``progress`` is called with (bytes read, bytes to read) while the weights load.

    Raises ConfigError or WeightError with what is wrong with the model or an option.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str | None = None,
        quantize: int | None = None,
        offline: bool = False,
        max_context: int | None = None,
        backend: str | None = None,
        threads: int | None = None,
        activations: str = "int8",
        progress: Progress | None = None,
    ) -> None:
        set_threads(threads)
        self.backend = choose(backend) if backend else active()
        folder = resolve(str(model), offline=offline)
        self.tokenizer = Tokenizer.from_folder(folder)
        with use(self.backend):
            self._model = load_model(
                folder, dtype=dtype, quantize=quantize, activations=activations, progress=progress
            )
        self.config = self._model.config
        self.max_context = _context(max_context, self.config.max_position_embeddings)
        self._end_ids = self.tokenizer.eos_ids.union(self.config.eos_token_ids, load_end_ids(folder))

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answer each prompt (a string, or a list of token ids); one prompt may stand alone.

        Raises RequestError before anything runs if any of them is invalid.
        """
        requests = [self._check(prompt, params) for prompt in _as_list(prompts)]
        return [_last(self._answer(ids, checked)) for ids, checked in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Answer one prompt, a chunk a token; the last chunk carries the Completion.

        Raises RequestError at once, not at the first chunk, if the request is invalid.
        """
        return self._answer(*self._check(prompt, params))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Completion:
        """Answer a conversation: messages like {"role": "user", "content": "..."}."""
        return _last(self.stream_chat(messages, params, tools=tools))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Iterator[Chunk]:
        """``chat`` as ``stream``: a chunk a token."""
        return self.stream(self.chat_prompt(messages, tools=tools), params)

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """The token ids that a conversation becomes under the model's chat template.

        Raises ConfigError if the model has no template, RequestError if it refuses the messages.
        """
        text = self.tokenizer.render_chat(messages, tools=tools)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check(self, prompt: Prompt, params: SamplingParams | None) -> tuple[list[int], SamplingParams]:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is a {type(params).__name__}, but must be a SamplingParams.")
        tokens = self._encode(prompt) if isinstance(prompt, str) else prompt
        ids = _as_ids(tokens, self.config.vocab_size)  # a tokenizer may know more tokens than the model
        if not ids:
            raise RequestError("The prompt is empty; give at least one character or token.")
        if len(ids) >= self.max_context:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but the context holds {self.max_context}, "
                "the answer included; shorten the prompt."
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return ids, replace(params, seed=seed)

    def _encode(self, text: str) -> list[int]:
        """Plain text to ids; a BOS that the text writes out is not doubled by the tokenizer's own."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _answer(self, ids: list[int], params: SamplingParams) -> Iterator[Chunk]:
        limit = min(params.max_tokens, self.max_context - len(ids))
        answer = Answer(self.tokenizer.stream(), params, self._end_ids, limit)
        tokens = generate(self._model, DenseCache(self.config.num_layers), ids, params)
        seconds: list[float] = []
        logprobs: list[dict[int, float]] = []
        while answer.finish_reason is None:
            began = time.perf_counter()  # around our work only, not the reader's between chunks
            with use(self.backend):
                token = next(tokens)
            seconds.append(time.perf_counter() - began)
            logprobs += [token.logprobs] if token.logprobs is not None else []
            piece = answer.push(token.id)
            done = _completion(answer, ids, params, logprobs, seconds) if answer.finish_reason else None
            yield Chunk(piece, [token.id], done)


def _completion(
    answer: Answer,
    prompt: list[int],
    params: SamplingParams,
    logprobs: list[dict[int, float]],
    seconds: list[float],
) -> Completion:
    assert answer.finish_reason is not None
    first, later = seconds[0], sum(seconds[1:])
    timing = Timing(
        prompt_tokens=len(prompt),
        completion_tokens=len(seconds),
        ttft_s=first,
        prefill_tok_s=len(prompt) / first,
        decode_tok_s=(len(seconds) - 1) / later if later else 0.0,
    )
    return Completion(
        text=answer.text,
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        prompt_token_ids=prompt,
        logprobs=logprobs if params.logprobs is not None else None,
        timing=timing,
    )


def _last(chunks: Iterator[Chunk]) -> Completion:
    *_, final = chunks
    assert final.completion is not None
    return final.completion


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A string or a list of numbers is one prompt; everything else is a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise RequestError(f"prompts is a {type(prompts).__name__}, but must be a string or a list.")
    given = list(prompts)
    if given and all(isinstance(p, int) for p in given):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]


def _as_ids(prompt: Sequence[int], vocab: int) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise RequestError(
            f"A prompt is a {type(prompt).__name__}, but must be a string or a list of token ids."
        )
    for i in prompt:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab:
            raise RequestError(f"Token id {i!r} is not in the vocabulary, which is 0 to {vocab - 1}.")
    return list(prompt)


def _context(asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not isinstance(asked, int) or not 2 <= asked <= most:
        raise ConfigError(f"max_context is {asked!r}, but must be from 2 to {most}, the model's own.")
    return asked
