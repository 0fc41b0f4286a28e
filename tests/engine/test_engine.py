"""The engine under faults, cancels and limits: one request's trouble is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from tiny_llm import LLM, CapacityError, Completion, SamplingParams
from tiny_llm.data import Batch, KVCache, Plan
from tiny_llm.engine.engine import Engine
from tiny_llm.engine.settings import EngineSettings
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
    engine.runner.model = Spoilt(engine.runner.model, spoil)
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


def test_a_form_decides_and_one_that_fails_ends_its_own_request(llm: LLM) -> None:
    vocab, seen = llm.config.vocab_size, list[int]()

    def seven_then_eight(answer: list[int]) -> bytes:
        seen.append(len(answer))
        wanted = 7 if len(answer) < 2 else 8
        return bytes(wanted) + b"\1" + bytes(vocab - wanted - 1)

    def fail(answer: list[int]) -> bytes:
        raise ZeroDivisionError("by design")

    engine, asked = llm.with_engine(SETTINGS).engine, prompt(llm, "What is decode?")
    held = engine.add(asked, replace(GREEDY, max_tokens=3, constraint=lambda: seven_then_eight))
    failing = engine.add(asked, replace(GREEDY, constraint=lambda: fail))
    free = engine.add(asked, replace(GREEDY, max_tokens=3))
    ended = {number: answers[0] for number, answers in drain(engine).items()}
    assert ended[held].token_ids == [7, 7, 8] and seen == [0, 1, 2]
    assert ended[failing].finish_reason == "error" and "by design" in str(ended[failing].error)
    assert ended[free].token_ids == llm.generate(asked, replace(GREEDY, max_tokens=3))[0].token_ids
    assert engine.healthy and used(engine) == 0


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
    few = SchedulerSettings(max_num_seqs=1, max_queued_requests=1)
    engine = llm.with_engine(EngineSettings(64, scheduler=few)).engine
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


def test_min_tokens_counts_alike_whether_or_not_steps_run_ahead(llm: LLM) -> None:
    """One token too few was counted in a step that was prepared ahead: 12 tokens came instead of 11."""
    ask, params = prompt(llm, "What is 34 + 25?"), SamplingParams(max_tokens=60, min_tokens=10)
    lengths = {}
    for ahead in (True, False):
        own = llm.with_engine(replace(SETTINGS, async_scheduling=ahead))
        lengths[ahead] = len(own.generate(ask, params)[0].token_ids)
    assert lengths == {True: 11, False: 11}, "ten tokens, and then the end"


def test_a_guess_of_time_is_learnt_from_whole_steps_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the steps that run ahead holds a part of the second; the last one was computed before."""
    engine = llm.with_engine(SETTINGS).engine
    told: list[Plan] = []
    monkeypatch.setattr(engine.scheduler.speed, "observe", lambda plan, ms: told.append(plan))
    engine.add(prompt(llm, "What is decode?"), GREEDY)
    drain(engine)
    assert engine.totals.steps == 12, "a prompt's, and one for each token after the first"
    assert [plan.decodes for plan in told] == [0] + [1] * 9, "all but the first and the last that ran ahead"


def test_the_scheduler_knows_how_a_models_steps_compare(llm: LLM) -> None:
    speed = llm.with_engine(SETTINGS).engine.scheduler.speed
    lone, chunk = speed.decode_ms(1, 0), speed.chunk_ms(0, 1)
    assert 1.2 * chunk < lone < 3 * chunk, "a token costs a step's weights, before anything is measured"


def test_no_stop_string_ends_an_answer_before_min_tokens(llm: LLM) -> None:
    ask = prompt(llm, "What is a KV cache?")
    params = SamplingParams(max_tokens=40, stop=("cache",), ignore_eos=True)
    assert len(llm.generate(ask, params)[0].token_ids) < 10
    held = llm.generate(ask, replace(params, min_tokens=30))[0]
    assert len(held.token_ids) >= 30 and "cache" in held.text, "what the first 30 say is shown whatever it is"


def test_a_form_that_allows_only_the_end_is_an_error_where_min_tokens_forbids_it(llm: LLM) -> None:
    """Every logit was -inf, and token 0 came out of that, twice."""
    vocab, end = llm.config.vocab_size, min(llm.end_ids)

    def only_the_end(answer: list[int]) -> bytes:
        return bytes(end) + b"\1" + bytes(vocab - end - 1)

    asked = prompt(llm, "What is decode?")
    params = SamplingParams(max_tokens=9, constraint=lambda: only_the_end)
    assert llm.generate(asked, params)[0].token_ids == [end]
    ended = llm.generate(asked, replace(params, min_tokens=2))[0]
    assert (ended.finish_reason, ended.token_ids) == ("error", [])
    assert "min_tokens" in str(ended.error) and "form" in str(ended.error)


def test_what_a_stop_string_takes_from_the_text_is_not_among_the_shown_tokens(llm: LLM) -> None:
    """token_ids and logprobs have every token that was made; shown_tokens says which of them the text has."""
    ask = prompt(llm, "What is a KV cache?")
    engine = llm.with_engine(SETTINGS).engine
    engine.add(ask, SamplingParams(max_tokens=40, stop=("cache keeps",), logprobs=1))
    text, shown = "", 0
    while len(engine):
        for _, chunk in engine.step():
            text, last = text + chunk.text, chunk
            assert shown <= chunk.shown_tokens
            shown = chunk.shown_tokens
    ended = last.completion
    assert ended is not None and ended.logprobs is not None
    assert ended.finish_reason == "stop" and ended.shown_tokens == shown < len(ended.token_ids)
    assert len(ended.logprobs) == len(ended.token_ids)
    shown_text = llm.tokenizer.decode(ended.token_ids[:shown])
    assert shown_text.startswith(ended.text) and "keeps" not in shown_text, (shown_text, ended.text)


def test_the_next_step_is_under_way_before_a_token_is_known(llm: LLM) -> None:
    steps: list[list[int]] = []

    def spoil(batch: Batch, logits: mx.array) -> mx.array:
        steps.append(batch.positions.tolist())
        return logits

    engine = spoilt(llm, spoil)
    ask = prompt(llm, "What is decode?")
    number = engine.add(ask, replace(GREEDY, max_tokens=6))
    engine.step()
    assert len(steps) == 1, "what follows a prompt is planned as ever"
    engine.step()
    assert steps[1:] == [[len(ask)], [len(ask) + 1]], "one step brought its token, and the next is on its way"
    assert drain(engine)[number][0].token_ids == llm.generate(ask, replace(GREEDY, max_tokens=6))[0].token_ids
    assert len(steps) == 6, "the length is known, so no step is made for nothing"


def test_who_needs_the_last_token_is_not_run_ahead(llm: LLM) -> None:
    for own in (
        {"presence_penalty": 1.0},
        {"repetition_penalty": 2.0},
        {"processors": (lambda _, row: row,)},
    ):
        engine = llm.with_engine(SETTINGS).engine
        engine.add(prompt(llm, "What is decode?"), replace(GREEDY, **own))
        for _ in range(4):
            engine.step()
        assert not engine._ahead, own


def test_what_the_last_token_does_not_change_is_run_ahead(llm: LLM) -> None:
    for own in ({"min_tokens": 9}, {"logit_bias": {5: 1.0}}, {"logprobs": 2}, {"stop": ("zebra",)}):
        engine = llm.with_engine(SETTINGS).engine
        engine.add(prompt(llm, "What is decode?"), replace(GREEDY, **own))
        for _ in range(4):
            engine.step()
        assert engine._ahead, own


def test_what_ends_while_its_next_step_is_under_way_leaves_nothing(llm: LLM) -> None:
    """By a cancel, by a time-out, by its own end: the others' tokens are theirs."""
    now = [0.0]
    engine = llm.with_engine(SETTINGS).engine
    engine._clock = lambda: now[0]
    asks = [prompt(llm, f"What is {what}?") for what in ("prefill", "decode", "paging", "34 + 25")]
    expected = llm.generate(asks[1], replace(GREEDY, max_tokens=40))[0].token_ids
    long = replace(GREEDY, max_tokens=40, speculate=False)
    gone, stays = engine.add(asks[0], long), engine.add(asks[1], long)
    late, ends = engine.add(asks[2], long, timeout_s=5), engine.add(asks[3], replace(long, ignore_eos=False))
    for _ in range(4):
        engine.step()
    assert engine._ahead
    engine.cancel(gone)
    now[0] = 6.0
    done = drain(engine)
    assert {number: own[0].finish_reason for number, own in done.items()} == {
        late: "timeout",
        ends: "stop",
        stays: "length",
    }
    assert done[stays][0].token_ids == expected
    assert used(engine) == 0 and not engine._ahead


def test_a_step_that_cannot_be_prepared_fails_alone(llm: LLM) -> None:
    """The step before it, which was under way, still brings its tokens."""
    calls: list[int] = []

    def spoil(batch: Batch, logits: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("by design")
        return logits

    engine = spoilt(llm, spoil)
    engine.add(prompt(llm, "What is decode?"), GREEDY)
    engine.step()
    (event,) = engine.step()
    assert len(calls) == 3 and engine.healthy and event.chunk.completion is None
    (event,) = engine.step()
    assert not engine.healthy and event.chunk.completion is not None
    assert len(event.chunk.completion.token_ids) == 2 and used(engine) == 0


def test_the_cheaper_way_to_make_room_is_measured(llm: LLM) -> None:
    """On one machine's memory a copy costs microseconds, and computing again milliseconds."""
    engine = llm.with_engine(EngineSettings(kv_blocks=14, host_blocks=64)).engine
    assert 0 < engine.scheduler.settings.swap_ms_per_block < 5
    for what in ("prefill", "decode", "paging", "a fox"):
        engine.add(prompt(llm, f"What is {what}?"), replace(GREEDY, max_tokens=60, speculate=False))
    drain(engine)
    assert engine.scheduler.preempted["swap"] > 0 == engine.scheduler.preempted["recompute"]


def test_stats_are_plain_and_add_up(llm: LLM) -> None:
    engine = llm.with_engine(SETTINGS).engine
    for what in ("prefill", "decode"):
        engine.add(prompt(llm, f"What is {what}?"), GREEDY)
    engine.step()
    during = json.loads(json.dumps(engine.stats().as_json()))
    assert during["running"] == 2 and during["blocks"]["used"] > 0 and during["blocks"]["wasted_slots"] > 0
    drain(engine)
    after = json.loads(json.dumps(engine.stats().as_json()))
    assert (after["running"], after["waiting"], after["blocks"]["used"]) == (0, 0, 0)
    assert after["generation_tokens"] == 24 and after["ends"] == {"length": 2}
    assert (
        after["ttft_s"]["count"] == after["queue_s"]["count"] == 2 and after["inter_token_s"]["count"] == 22
    )
    assert sum(after["parts"].values()) > 0 and after["blocks"]["cached"] > 0


@pytest.mark.slow
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


def test_a_prompt_s_logprobs_are_the_same_in_whatever_chunks_and_company(llm: LLM) -> None:
    asked = prompt(llm, "What is a KV cache? Say it at length, in many words and sentences, please.") * 3
    params = replace(GREEDY, max_tokens=4, prompt_logprobs=2)

    def scored(company: int, step_tokens: int, kv_blocks: int = 256) -> list[dict[int, float]]:
        scheduler = SchedulerSettings(max_num_seqs=16, max_num_batched_tokens=step_tokens)
        engine = llm.with_engine(EngineSettings(kv_blocks, scheduler=scheduler)).engine
        numbers = [engine.add(asked, replace(params, n=2)), engine.add(asked, params)]
        others = [engine.add(asked[: 9 + i], GREEDY) for i in range(company)]
        told: dict[int, list[list[dict[int, float]]]] = {}
        while len(engine):
            for number, chunk in engine.step():
                if chunk.prompt_logprobs is not None:
                    told.setdefault(number, []).append(chunk.prompt_logprobs)
            engine.scheduler.check_integrity()
        assert engine.healthy and not told.keys() & set(others)
        assert [len(told[number]) for number in numbers] == [2, 1], "once for each answer"
        first, *rest = [rows for number in numbers for rows in told[number]]
        assert all(rows == first for rows in rest)
        return first

    whole = scored(0, 4096)
    assert len(whole) == len(asked) - 1 and all(
        next(iter(row)) == token for row, token in zip(whole, asked[1:], strict=True)
    )
    for company, step_tokens, kv_blocks in ((0, 17, 256), (6, 64, 256), (6, 33, 24)):
        assert scored(company, step_tokens, kv_blocks) == whole, f"{company} others, {step_tokens} a step"
