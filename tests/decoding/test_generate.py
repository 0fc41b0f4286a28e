"""The generation loop, on a small attention model that is written here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, KVCache
from tiny_llm.decoding.generate import Forward, Token, generate, generate_without_cache, one_sequence
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.sampling.logprobs import log_probabilities
from tiny_llm.sampling_params import SamplingParams

pytestmark = [pytest.mark.chapter("1.6"), pytest.mark.chapter("2.1")]

VOCAB, HEADS, DIM = 23, 2, 8


def small_model() -> Forward:
    """One attention layer over token and position embeddings: every past token matters."""
    keys = mx.random.split(mx.random.key(0), 4)
    tokens = mx.random.normal((VOCAB, HEADS, DIM), key=keys[0])
    places = mx.random.normal((256, HEADS, DIM), key=keys[1])
    head = mx.random.normal((HEADS * DIM, VOCAB), key=keys[2])

    def forward(batch: Batch, kv: KVCache) -> mx.array:
        x = tokens[batch.tokens] + places[batch.positions]
        seen = kv.attend(0, x, x[:, :1], mx.tanh(x[:, 1:]), batch)
        return (x + seen)[batch.logit_rows].reshape(-1, HEADS * DIM) @ head

    return forward


def ids(tokens: Iterator[Token], count: int = 30) -> list[int]:
    return [token.id for token in islice(tokens, count)]


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SAMPLED = SamplingParams(temperature=1.2, top_k=12, top_p=0.95, seed=7)


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_cache_changes_nothing(params: SamplingParams) -> None:
    without = ids(generate_without_cache(small_model(), PROMPT, params))
    assert len(set(without)) > 3, f"the model must not fall into one token: {without}"
    assert ids(generate(small_model(), DenseCache(1), PROMPT, params)) == without


def test_a_batch_of_one_sequence_by_hand() -> None:
    batch = one_sequence((7, 8, 9), start=5)
    assert batch.tokens.tolist() == [7, 8, 9] and batch.tokens.dtype == mx.int32
    assert batch.positions.tolist() == [5, 6, 7] and batch.positions.dtype == mx.int32
    assert batch.query_start_loc == (0, 3), "which rows are its own, wherever it stands"
    assert batch.logit_rows.tolist() == [2] and batch.logit_rows.dtype == mx.int32


def test_the_prompt_stays_as_it_is() -> None:
    mine = list(PROMPT)
    assert ids(generate_without_cache(small_model(), mine, SAMPLED), 5)
    assert mine == PROMPT
    assert ids(generate_without_cache(small_model(), tuple(PROMPT), SAMPLED), 5)


def test_tokens_come_without_end_and_after_one_pass_each() -> None:
    passes = list[int]()
    model = small_model()

    def watched(batch: Batch, kv: KVCache) -> mx.array:
        passes.append(batch.tokens.size)
        return model(batch, kv)

    prompt, params = [number % VOCAB for number in range(100)], SamplingParams(max_tokens=2)
    without = generate_without_cache(watched, prompt, params)
    first = [next(without).id]
    assert passes == [100], "what nobody has asked for is not computed"
    cached = ids(generate(model, DenseCache(1), prompt, params), 70)
    assert first + ids(without, 2) == cached[:3], "the whole prompt counts, however long it is"
    assert len(cached) == 70, "who iterates decides when it ends"


@pytest.mark.parametrize("chunk", [1, 2, 5, 10, 11, 12])
def test_the_prompt_may_come_in_chunks_of_any_size(chunk: int) -> None:
    whole = ids(generate(small_model(), DenseCache(1), PROMPT, SAMPLED))
    assert ids(generate(small_model(), DenseCache(1), PROMPT, SAMPLED, chunk=chunk)) == whole


def test_each_token_goes_through_the_model_once() -> None:
    """Rows of each pass: the prompt in chunks, then one token a step at its own position."""
    model, passes = small_model(), []

    def watched(batch: Batch, kv: KVCache) -> mx.array:
        passes.append(batch.positions.tolist())
        assert batch.query_start_loc == (0, batch.tokens.size) and batch.logit_rows.tolist() == [
            batch.tokens.size - 1
        ]
        return model(batch, kv)

    ids(generate(watched, DenseCache(1), PROMPT, SamplingParams(), chunk=4), 3)
    assert passes == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [11], [12]]


def test_greedy_is_the_argmax_of_the_model_at_every_step() -> None:
    model, tokens = small_model(), list(PROMPT)
    for token in islice(generate(model, DenseCache(1), PROMPT, SamplingParams(logprobs=2)), 10):
        rows = len(tokens)
        batch = Batch(mx.array(tokens), mx.arange(rows), (0, rows), mx.array([rows - 1]))
        logits = model(batch, NoCache())
        assert token.id == mx.argmax(logits).item()
        assert token.logprobs is not None and next(iter(token.logprobs)) == token.id
        expected = log_probabilities(logits)[0, token.id].item()
        assert token.logprobs[token.id] == pytest.approx(expected, abs=1e-5)
        tokens.append(token.id)


def test_a_seed_repeats_and_another_differs() -> None:
    def run(seed: int) -> list[int]:
        params = SamplingParams(temperature=2.0, seed=seed)
        return ids(generate(small_model(), DenseCache(1), PROMPT, params))

    assert run(1) == run(1)
    assert run(1) != run(2)
