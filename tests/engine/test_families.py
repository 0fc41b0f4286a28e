"""Each family in the engine: the same tokens whatever the traffic, and contexts joined, or refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import Batch
from tiny_llm.decoding.generate import one_sequence
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import RequestError
from tiny_llm.ops.backend import use
from tiny_llm.scheduler.settings import SchedulerSettings

FAMILIES = ("gpt2", "ernie4_5", "phi3", "phi3_long", "smollm3", "olmo2", "granite", "gemma3", "qwen2_yarn")
GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
SHARED = [(5 * i + 2) % 60 for i in range(37)]
PROMPTS = [[*SHARED[:35], 3], SHARED, [7, 8, 9], SHARED[:20] + [11] * 9, SHARED[:5], [1] * 24]


@pytest.fixture
def folder(golden: Path, demo: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A golden model with a tokenizer beside it; its tokens have other texts than they mean."""
    copy = tmp_path / "model"
    shutil.copytree(golden / str(request.param), copy)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, copy)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_same_tokens_whatever_the_traffic(folder: Path) -> None:
    """Chunks of a prompt, others in the step, prefixes found again, preemption and guesses change none."""
    llm = LLM(folder, speculate="off")
    params = [replace(GREEDY, temperature=(0.0, 0.9)[i % 2], seed=i) for i in range(len(PROMPTS))]
    alone = [llm.generate([prompt], how)[0].token_ids for prompt, how in zip(PROMPTS, params, strict=True)]
    scheduler = SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=13)
    for guess in ("off", "ngram"):
        settings = EngineSettings(kv_blocks=7, speculate=guess, scheduler=scheduler)  # type: ignore[arg-type]
        crowd = llm.with_engine(settings)
        for again in range(2):
            got = [answer.token_ids for answer in crowd.generate(PROMPTS, params)]
            assert got == alone, f"guesses {guess}, time {again}"
        crowd.engine.scheduler.check_integrity()


class Apart:
    """Attention of one sequence: a token of a context sees that alone, and one behind them sees all."""

    def __init__(self, groups: list[int]) -> None:
        self.groups = mx.array(groups)  # [T], -1 for the prompt

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, batch: Batch, *, window: int = 0
    ) -> mx.array:
        assert not window
        rows, each = q.shape[0], q.shape[1] // k.shape[1]
        k, v = (mx.repeat(x, each, axis=1) for x in (k, v))
        scores = mx.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        mine, theirs = self.groups[:, None], self.groups[None]
        seen = ((mine == theirs) | (mine == -1)) & (mx.arange(rows)[:, None] >= mx.arange(rows)[None])
        return mx.einsum("hqk,khd->qhd", mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1), v)


@pytest.mark.parametrize("folder", ["ernie4_5", "phi3_long", "smollm3", "qwen2_yarn"], indirect=True)
def test_each_layer_s_keys_are_turned_as_it_turns_them(folder: Path) -> None:
    """Independent contexts: neighbours, a part of a head, or nothing, as in some of SmolLM3's layers."""
    contexts, prompt = [SHARED, [9, 3] * 11, list(range(40, 8, -1))], [4, 5, 6]
    llm = LLM(folder, dtype="float32")
    for number, tokens in enumerate(contexts):
        llm.contexts.add(str(number), tokens)
    params = replace(GREEDY, max_tokens=1, logprobs=5)
    (got,) = llm.generate([prompt], params, contexts=["0", "1", "2"], join="independent")
    groups = [number for number, tokens in enumerate(contexts) for _ in tokens] + [-1] * len(prompt)
    with use("ref"):
        reference = LLM(folder, backend="ref", dtype="float32")._model
        assert reference is not None
        whole = one_sequence([token for part in (*contexts, prompt) for token in part], 0)
        logits = reference(whole, Apart(groups))[0]
    want = logits - mx.logsumexp(logits)
    assert got.logprobs is not None
    off = max(abs(found - want[token].item()) for token, found in got.logprobs[0].items())
    assert off < 2e-4


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_gpt2_s_contexts_are_joined_exactly_or_not_at_all(folder: Path) -> None:
    """A learned place is part of a key, and cannot be taken out again."""
    llm = LLM(folder)
    llm.contexts.add("one", SHARED)
    with pytest.raises(RequestError, match="keys cannot be turned to another place; join contexts exactly"):
        llm.generate([[4]], GREEDY, contexts=["one"], join="independent")
    (got,) = llm.generate([[4]], GREEDY, contexts=["one"])
    assert got.token_ids == LLM(folder).generate([[*SHARED, 4]], GREEDY)[0].token_ids
