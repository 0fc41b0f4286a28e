"""The engine under faults, cancels and limits: one request's trouble is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from tiny_llm import LLM, CapacityError, Completion, SamplingParams
from tiny_llm.data import Batch, KVCache
from tiny_llm.engine.engine import Engine, EngineSettings
from tiny_llm.errors import BusyError
from tiny_llm.models.registry import Model
from tiny_llm.scheduler.settings import SchedulerSettings

SETTINGS = EngineSettings(kv_blocks=64)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


class Spoilt:
    """A model whose logits go through ``spoil`` first."""

    def __init__(self, model: Model, spoil: Callable[[Batch, mx.array], mx.array]) -> None:
        self.config = model.config
        self._model = model
        self._spoil = spoil

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        return self._spoil(batch, self._model(batch, kv))


def spoilt(llm: LLM, spoil: Callable[[Batch, mx.array], mx.array]) -> Engine:
    engine = llm.with_engine(SETTINGS).engine
    engine._model = Spoilt(engine._model, spoil)
    return engine


def prompt(llm: LLM, question: str) -> list[int]:
    return llm.chat_prompt([{"role": "user", "content": question}])


def drain(engine: Engine) -> dict[int, list[Completion]]:
    """Step until nothing is left; the completions of each request."""
    done: dict[int, list[Completion]] = {}
    while len(engine):
        for number, chunk in engine.step():
            if chunk.completion is not None:
                done.setdefault(number, []).append(chunk.completion)
        engine.scheduler.check_integrity()
    return done


def used(engine: Engine) -> int:
    return engine.scheduler.usage().used


def test_a_processor_that_raises_ends_its_request_alone(llm: LLM) -> None:
    def fail(tokens: list[int], logits: mx.array) -> mx.array:
        if len(tokens) > len(prompt(llm, "What is prefill?")) + 3:
            raise ZeroDivisionError("by design")
        return logits

    engine = llm.with_engine(SETTINGS).engine
    expected = llm.with_engine(SETTINGS).generate(prompt(llm, "What is decode?"), GREEDY)[0]
    bad = engine.add(prompt(llm, "What is prefill?"), replace(GREEDY, processors=(fail,)))
    good = engine.add(prompt(llm, "What is decode?"), GREEDY)
    done = drain(engine)
    assert done[bad][0].finish_reason == "error"
    assert "ZeroDivisionError: by design" in (done[bad][0].error or "")
    assert len(done[bad][0].token_ids) == 4, "what came before the fault is kept"
    assert done[good][0].token_ids == expected.token_ids
    assert engine.healthy and used(engine) == 0


def test_a_processor_decides(llm: LLM) -> None:
    def only_seven(tokens: list[int], logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.size) == 7, logits, -mx.inf)

    done = llm.generate(
        prompt(llm, "What is decode?"), replace(GREEDY, max_tokens=3, processors=(only_seven,))
    )
    assert done[0].token_ids == [7, 7, 7]


def test_logits_that_are_not_finite_end_their_request_alone(llm: LLM) -> None:
    def spoil(batch: Batch, logits: mx.array) -> mx.array:
        sick = batch.tokens[batch.logit_rows] == first  # the row whose last token is the bad request's
        return mx.where(sick[:, None], mx.nan, logits)

    question, other = prompt(llm, "What is prefill?"), prompt(llm, "What is decode?")
    first = llm.generate(question, GREEDY)[0].token_ids[0]
    expected = llm.with_engine(SETTINGS).generate(other, GREEDY)[0].token_ids
    assert first not in expected, "else the good request would be hit too"
    engine = spoilt(llm, spoil)
    bad, good = engine.add(question, GREEDY), engine.add(other, GREEDY)
    done = drain(engine)
    assert done[bad][0].finish_reason == "error" and "not finite" in (done[bad][0].error or "")
    assert done[good][0].token_ids == expected


def test_a_step_that_fails_ends_those_in_it_and_the_engine_goes_on(llm: LLM) -> None:
    calls: list[int] = []

    def spoil(batch: Batch, logits: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("by design")
        return logits

    expected = llm.with_engine(SETTINGS).generate(prompt(llm, "What is decode?"), GREEDY)[0]
    engine = spoilt(llm, spoil)
    hit = [engine.add(prompt(llm, q), GREEDY) for q in ("What is prefill?", "What is paging?")]
    while engine.healthy:
        events = engine.step()
    assert len(calls) == 5 and engine.totals.failed_steps == 1
    ends = {number: chunk.completion for number, chunk in events if chunk.completion}
    assert {ends[number].finish_reason for number in hit} == {"error"}
    assert "MemoryError: by design" in (ends[hit[0]].error or "")
    later = engine.add(prompt(llm, "What is decode?"), GREEDY)
    assert drain(engine)[later][0].token_ids == expected.token_ids
    assert engine.healthy and used(engine) == 0


def test_cancel_and_timeout_free_the_blocks_within_a_step(llm: LLM) -> None:
    now = [0.0]
    engine = llm.with_engine(SETTINGS).engine
    engine._clock = lambda: now[0]
    long = replace(GREEDY, max_tokens=200)
    gone = engine.add(prompt(llm, "What is prefill?"), long)
    late = engine.add(prompt(llm, "What is paging?"), long, timeout_s=5)
    for _ in range(3):
        engine.step()
    assert used(engine) > 0
    events = engine.cancel(gone)
    assert [chunk.completion.finish_reason for _, chunk in events if chunk.completion] == ["cancelled"]
    now[0] = 6.0
    ends = [chunk.completion for number, chunk in engine.step() if number == late]
    assert ends[-1] is not None and ends[-1].finish_reason == "timeout" and len(ends[-1].token_ids) == 3
    assert used(engine) == 0 and not len(engine)
    assert engine.cancel(gone) == [], "twice is nothing"


def test_what_can_never_fit_is_refused_with_the_numbers(llm: LLM) -> None:
    engine = llm.with_engine(EngineSettings(kv_blocks=4)).engine
    with pytest.raises(CapacityError, match=r"needs \d+ blocks of 16 tokens .* but there are 4"):
        engine.add(prompt(llm, "What is prefill?"), replace(GREEDY, max_tokens=100))
    assert not len(engine)


def test_a_full_queue_refuses(llm: LLM) -> None:
    engine = llm.with_engine(EngineSettings(64, scheduler=SchedulerSettings(max_waiting=2))).engine
    for _ in range(2):
        engine.add(prompt(llm, "What is prefill?"), GREEDY)
    with pytest.raises(BusyError):
        engine.add(prompt(llm, "What is prefill?"), GREEDY)
    assert len(drain(engine)) == 2


def test_n_answers_share_the_prompt_and_are_those_of_their_seeds(llm: LLM) -> None:
    engine = llm.with_engine(SETTINGS).engine
    drawn = SamplingParams(max_tokens=20, temperature=1.2, seed=3, n=4, ignore_eos=True)
    number = engine.add(prompt(llm, "Tell me a story about a fox."), drawn)
    answers = sorted(drain(engine)[number], key=lambda c: c.index)
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in answers}) == 4
    alone = llm.generate(prompt(llm, "Tell me a story about a fox."), replace(drawn, n=1))[0]
    assert answers[0].token_ids == alone.token_ids
    assert engine.totals.prompt_tokens == len(answers[0].prompt_token_ids), "the prompt was computed once"


def test_the_next_turn_finds_the_whole_conversation_in_the_cache(llm: LLM) -> None:
    own = llm.with_engine(SETTINGS)
    first = [{"role": "user", "content": "What is a KV cache?"}]
    said = own.chat(first)
    turn = [*first, {"role": "assistant", "content": said.text}, {"role": "user", "content": "Thank you."}]
    again = own.chat(turn)
    known = len(said.prompt_token_ids) + len(said.token_ids)
    assert again.cached_tokens >= known - 16, f"{again.cached_tokens} of {known} tokens were found"


def test_penalties_and_biases_change_the_choice(llm: LLM) -> None:
    ask = prompt(llm, "What is a KV cache?")
    plain = llm.generate(ask, GREEDY)[0].token_ids
    assert llm.generate(ask, replace(GREEDY, logit_bias={plain[0]: -100.0}))[0].token_ids[0] != plain[0]
    assert llm.generate(ask, replace(GREEDY, logit_bias={7: 1000.0}))[0].token_ids == [7] * 12
    varied = llm.generate(ask, replace(GREEDY, logit_bias={7: 1000.0}, frequency_penalty=2.0))[0]
    assert varied.token_ids == [7] * 12, "a bias of 1000 is stronger than twelve times 2"
    once = llm.generate(ask, replace(GREEDY, max_tokens=40, presence_penalty=2.0, repetition_penalty=5.0))[0]
    assert len(set(once.token_ids)) > 35, "hardly a token comes twice"


def test_min_tokens_puts_off_the_end(llm: LLM) -> None:
    ask = prompt(llm, "What is 34 + 25?")
    short = llm.generate(ask, SamplingParams(max_tokens=60))[0]
    longer = llm.generate(ask, SamplingParams(max_tokens=60, min_tokens=len(short.token_ids) + 10))[0]
    assert short.finish_reason == "stop"
    assert len(longer.token_ids) > len(short.token_ids) + 9


def test_memory_stays_flat_over_many_steps(llm: LLM) -> None:
    """New keys and values are written in place: no step leaves anything behind."""
    engine = llm.with_engine(EngineSettings(kv_blocks=256)).engine
    engine.add(prompt(llm, "What is prefill?"), replace(GREEDY, max_tokens=900))
    for _ in range(50):
        engine.step()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(800):
        engine.step()
    assert mx.get_active_memory() - before < 200_000
    assert mx.get_peak_memory() - before < 5_000_000
