"""Named contexts: computed once, kept whatever comes, put before prompts in two ways, each what it says."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import Batch
from tiny_llm.decoding.generate import one_sequence
from tiny_llm.engine.contexts import Joining, NewContext
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import CapacityError, ContextError, RequestError
from tiny_llm.ops.backend import use

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ONE = list(range(5, 75))
TWO = list(range(200, 239))
THREE = list(range(300, 345))
PROMPT = [7, 8, 9]


@dataclass
class Apart:
    """Attention in which a token of a context sees that context alone, and one of the prompt sees all."""

    groups: mx.array  # [T], -1 for the prompt

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        rows, each = q.shape[0], q.shape[1] // k.shape[1]
        k, v = (mx.repeat(x, each, axis=1).astype(mx.float32) for x in (k, v))
        scores = mx.einsum("qhd,khd->hqk", q.astype(mx.float32), k) * q.shape[-1] ** -0.5
        mine, theirs = self.groups[:, None], self.groups[None]
        seen = ((mine == theirs) | (mine == -1)) & (mx.arange(rows)[:, None] >= mx.arange(rows)[None])
        weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1)
        return mx.einsum("hqk,khd->qhd", weights, v).astype(q.dtype)


def with_contexts(llm: LLM) -> LLM:
    for name, tokens in (("one", ONE), ("two", TWO), ("three", THREE)):
        llm.contexts.add(name, tokens)
    return llm


def test_exact_contexts_give_the_tokens_of_one_long_prompt(demo: Path, backend: str) -> None:
    llm = with_contexts(LLM(demo, backend=backend))
    (want,) = LLM(demo, backend=backend).generate([ONE + TWO + THREE + PROMPT], GREEDY)
    for cached in (len(ONE), len(ONE + TWO + THREE)):
        (got,) = llm.generate([PROMPT], GREEDY, contexts=["one", "two", "three"])
        assert got.token_ids == want.token_ids and got.prompt_token_ids == want.prompt_token_ids
        assert got.cached_tokens >= cached
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_independent_contexts_are_each_as_if_alone(demo: Path, backend: str, kept: str) -> None:
    """Against attention that lets no context see another, on the whole prompt at once."""
    llm = with_contexts(LLM(demo, backend=backend, dtype="float32", kv_dtype=kept, activations="exact"))
    for names in (("one", "two", "three"), ("three", "one"), ("two",)):
        parts = [{"one": ONE, "two": TWO, "three": THREE}[name] for name in names]
        tokens = [token for part in parts for token in part] + PROMPT
        groups = [number for number, part in enumerate(parts) for _ in part] + [-1] * len(PROMPT)
        reference = LLM(demo, backend="ref", dtype="float32")
        with use("ref"):
            assert reference._model is not None
            logits = reference._model(one_sequence(tokens, 0), Apart(mx.array(groups)))[0]
        want = logits - mx.logsumexp(logits)
        params = replace(GREEDY, max_tokens=1, logprobs=5)
        (got,) = llm.generate([PROMPT], params, contexts=names, join="independent")
        assert got.prompt_token_ids == tokens and got.logprobs is not None
        off = max(abs(found - want[token].item()) for token, found in got.logprobs[0].items())
        assert off < (2e-4 if kept == "auto" else 0.2), names


def test_the_first_tokens_of_independent_contexts_may_be_computed_anew(demo: Path) -> None:
    llm = with_contexts(LLM(demo))
    names = ["one", "two", "three"]
    exact = llm.generate([PROMPT], GREEDY, contexts=names)[0]
    for recompute, cached in ((0, 154), (4, 146), (45, 70), (1000, 70)):
        own = with_contexts(llm.with_engine(EngineSettings(kv_blocks=256)))
        (got,) = own.generate([PROMPT], GREEDY, contexts=names, join="independent", recompute=recompute)
        assert got.cached_tokens == cached
        if recompute > 44:  # all but the first is computed in order: nothing is approximate any more
            assert got.token_ids == exact.token_ids
        (again,) = own.generate([PROMPT], GREEDY, contexts=names, join="independent", recompute=recompute)
        assert again.token_ids == got.token_ids and again.cached_tokens == 156
        own.engine.scheduler.check_integrity()


@pytest.mark.parametrize("how", ["exact", "independent"])
def test_contexts_stay_while_others_fill_the_pool_and_change_no_token(demo: Path, how: str) -> None:
    """Alone, in company, after preemption by recomputing and by swapping: the same tokens."""
    whole = with_contexts(LLM(demo))
    names = ["two", "one"]
    sampled = replace(GREEDY, max_tokens=40, temperature=1.0, seed=3)
    (want,) = whole.generate([PROMPT], sampled, contexts=names, join=how)  # type: ignore[arg-type]
    small = with_contexts(whole.with_engine(EngineSettings(kv_blocks=36, host_blocks=12)))
    others = [[10 * n + 3] * 50 for n in range(12)]
    engine = small.engine
    joining = Joining(names, how)  # type: ignore[arg-type]
    for prompt in others[:6]:
        engine.add(prompt, sampled)
    mine = engine.add(PROMPT, sampled, joining=joining)
    for prompt in others[6:]:
        engine.add(prompt, sampled)
    ended = {}
    while len(engine):
        ended |= {e.request_id: e.chunk.completion for e in engine.step() if e.chunk.completion}
        engine.scheduler.check_integrity()
    assert sum(engine.scheduler.preempted.values()) > 0 and ended[mine].token_ids == want.token_ids
    assert all(info.is_ready for info in small.contexts)
    (again,) = small.generate([PROMPT], sampled, contexts=["one"])
    assert again.cached_tokens >= 64, "what the others needed was not taken from a context"


def test_contexts_outlive_a_step_that_fails_and_a_rest(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = with_contexts(LLM(demo))
    (want,) = llm.generate([PROMPT], GREEDY, contexts=["three", "two"], join="independent")
    llm.engine.rest()
    assert all(info.is_ready for info in llm.contexts)
    cache = llm.engine.cache
    prepare = cache.prepare
    monkeypatch.setattr(cache, "prepare", lambda plan: 1 / 0)
    with pytest.raises(RequestError, match="ZeroDivisionError"):
        list(llm.stream([1, 2], GREEDY))
    monkeypatch.setattr(cache, "prepare", prepare)
    assert not any(info.is_ready for info in llm.contexts), "they are being computed again"
    (got,) = llm.generate([PROMPT], GREEDY, contexts=["three", "two"], join="independent")
    assert got.token_ids == want.token_ids and all(info.is_ready for info in llm.contexts)
    llm.engine.scheduler.check_integrity()


def test_a_context_that_cannot_be_computed_ends_those_who_wait_for_it(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LLM(demo).engine
    engine.add(ONE, GREEDY, context=NewContext("one"))
    waiting = engine.add(PROMPT, GREEDY, joining=Joining(["one"], "independent"))
    monkeypatch.setattr(engine.cache, "prepare", lambda plan: 1 / 0)
    errors = []
    while len(engine):
        errors += [
            e.chunk.completion.error for e in engine.step() if e.chunk.completion and e.request_id == waiting
        ]
    assert errors == ["The context 'one' could not be computed."] and engine.contexts.listed() == []


def test_what_was_removed_is_gone_once_nobody_uses_it(demo: Path) -> None:
    llm = with_contexts(LLM(demo))
    (want,) = llm.generate([PROMPT], GREEDY, contexts=["one", "two"], join="independent")
    (exact,) = llm.generate([PROMPT], GREEDY, contexts=["one", "two"])
    engine, pins = llm.engine, llm.engine.scheduler.pins
    number = engine.add(PROMPT, GREEDY, joining=Joining(["one", "two"], "independent"), salt="")
    llm.contexts.remove("one")
    llm.contexts.remove("two")
    with pytest.raises(RequestError, match="There is no context 'one'; there are: three"):
        llm.generate([PROMPT], GREEDY, contexts=["one"])
    ended = []
    while len(engine):
        ended += [e.chunk.completion for e in engine.step() if e.request_id == number and e.chunk.completion]
    assert ended[0].token_ids == want.token_ids and exact.token_ids
    llm.contexts.remove("three")
    assert pins.used_blocks == 0 and not list(llm.contexts) and llm.engine.scheduler.usage().used == 0


def test_a_context_ends_with_its_time(demo: Path) -> None:
    llm = LLM(demo)
    assert llm.contexts.add("long", ONE, ttl_s=100).left_s == pytest.approx(100, abs=20)
    assert llm.contexts.add("long", ONE).left_s is None, "said again, it stays"
    llm.contexts.add("short", TWO, ttl_s=0.5)
    time.sleep(0.5)
    llm.engine.step()
    assert [info.name for info in llm.contexts] == ["long"]


def test_an_answer_is_kept_without_computing_it_again(demo: Path) -> None:
    llm = LLM(demo)
    (answer,) = llm.generate([ONE], GREEDY)
    before = llm.engine.totals.parts
    assert before is not None
    info = llm.contexts.add("answer", answer)
    assert info.tokens == len(ONE) + 12
    (got,) = llm.generate([PROMPT], GREEDY, contexts=["answer"])
    assert got.cached_tokens == info.tokens


def test_equal_texts_share_their_blocks(demo: Path) -> None:
    llm = with_contexts(LLM(demo))
    used = llm.engine.scheduler.pins.used_blocks
    llm.contexts.add("one too", ONE)
    assert llm.engine.scheduler.pins.used_blocks - used <= 1, (
        "a last block that is not full is each one's own"
    )


def test_nobody_finds_a_context_of_another_salt(demo: Path) -> None:
    engine = LLM(demo).engine
    engine.add(ONE, GREEDY, context=NewContext("one"), salt="a key")
    while len(engine):
        engine.step()
    assert engine.contexts.find("one", "a key") and not engine.contexts.listed("")
    for salt in ("", "another key"):
        with pytest.raises(RequestError, match="There is no context 'one'; there are: none"):
            engine.add(PROMPT, GREEDY, joining=Joining(["one"]), salt=salt)


def test_what_cannot_be_is_refused_in_words(demo: Path) -> None:
    llm = with_contexts(LLM(demo).with_engine(EngineSettings(kv_blocks=32)))
    with pytest.raises(RequestError, match="There is a context 'one' of another text; remove it first"):
        llm.contexts.add("one", TWO)
    with pytest.raises(CapacityError, match="Contexts may take 16 blocks of 16 tokens, and with this one"):
        llm.contexts.add("four", list(range(100)))
    with pytest.raises(RequestError, match="join is 'loosely', but must be one of exact, independent"):
        llm.generate([PROMPT], GREEDY, contexts=["one"], join="loosely")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="contexts must be a list of names"):
        llm.generate([PROMPT], GREEDY, contexts="one")
    with pytest.raises(RequestError, match="independent contexts have none; join them exactly"):
        llm.generate([PROMPT], replace(GREEDY, prompt_logprobs=1), contexts=["one"], join="independent")
    with pytest.raises(RequestError, match="A context's name has 1 to 128 characters"):
        llm.contexts.add("", TWO)
    with pytest.raises(ContextError, match="With its contexts the prompt is too long"):
        llm.generate([[1] * (llm.max_context - 50)], GREEDY, contexts=["one"])
    assert [info.hits for info in llm.contexts] == [2, 0, 0] and llm.engine.contexts.find("one").users == 0


def test_a_chats_contexts_stand_in_its_system_message(demo: Path) -> None:
    llm = with_contexts(LLM(demo))
    ids, at = llm.chat_place("What is a KV cache?", contexts=True)
    answer = llm.chat("What is a KV cache?", GREEDY, contexts=["two", "one"])
    joined = ids[:at] + TWO + ONE + ids[at:]
    assert answer.prompt_token_ids == joined
    assert answer.token_ids == llm.generate([joined], GREEDY)[0].token_ids
    again = llm.chat("Who decides?", GREEDY, contexts=["two", "one"])
    assert again.cached_tokens >= at + len(TWO + ONE), "what was computed in order is kept, too"
    loose = llm.chat("Who decides?", GREEDY, contexts=["one", "two"], join="independent")
    assert loose.error is None and loose.cached_tokens >= len(TWO + ONE)
