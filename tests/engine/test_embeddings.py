"""Texts to vectors: as sentence-transformers makes them, and the same bits whatever else is running."""

from __future__ import annotations

import asyncio
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm import LLM, AsyncLLM, RequestError, SamplingParams
from tiny_llm.config_embedding import TextEmbedding
from tiny_llm.data import Plan, PlanItem
from tiny_llm.decoding.pooling import Pool, pooled_rows
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import BusyError, ContextError
from tiny_llm.sampling_params import Pooling, PoolingParams
from tiny_llm.scheduler.places import Place, StepPlan
from tiny_llm.scheduler.settings import SchedulerSettings

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("qwen3_last", "llama_mean")
TEXTS = (
    "a fox",
    "What is a KV cache?",
    "Paged attention keeps the cache in blocks. " * 36,
    "What is a KV cache? " * 9,
    "Tell me a story of a fox and a bear. " * 4,
)
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    """Each model that tools/make_golden_embeddings.py made."""
    return ROOT / "golden_embeddings" / str(request.param)


@pytest.fixture(scope="module")
def llm(demo: Path) -> LLM:
    """The bundled model, on the best backend of this machine."""
    return LLM(demo)


def off(vector: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(vector, expected, strict=True))


def length(vector: Sequence[float]) -> float:
    return sum(x * x for x in vector) ** 0.5


def test_vectors_are_those_of_sentence_transformers(folder: Path, backend: str) -> None:
    llm = LLM(folder, dtype="float32", backend=backend)
    for asked in json.loads((folder / "vectors.json").read_text()):
        expected, text, ids = asked.pop("vector"), asked.pop("text"), asked.pop("ids")
        (got,) = llm.embed(text, **asked)
        if "dimensions" in asked and folder.name == "qwen3_last":  # which cuts, and leaves it at that
            expected = [x / length(expected) for x in expected]
        assert off(got.vector, expected) < 1e-5, (text, asked, off(got.vector, expected))
        assert got.prompt_tokens == len(ids), f"{text!r} was read as other tokens"


def test_ids_are_read_as_they_are(folder: Path) -> None:
    llm = LLM(folder, dtype="float32")
    for asked in json.loads((folder / "vectors.json").read_text())[:4]:
        ids = asked["ids"]
        by_text, by_ids = llm.embed([asked["text"], ids])
        assert by_text.vector == by_ids.vector
        assert llm.embed(ids)[0].vector == by_ids.vector, "a list of numbers is one text"


def test_a_model_without_its_head_does_not_answer() -> None:
    with pytest.raises(RequestError, match=r"saved without its head.*LLM\.embed"):
        LLM(ROOT / "golden_embeddings" / "qwen3_last").generate("a")


def test_a_head_that_is_just_missing_is_said(golden: Path, tmp_path: Path) -> None:
    """Only where the tensors' names are those of a model without one may it be left out."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "golden_embeddings" / "llama_mean", folder)
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    del arrays["lm_head.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(Exception, match=r"missing: lm_head\.weight"):
        LLM(folder)


def test_what_a_folder_says_nothing_of_is_the_last_token_at_length_1(llm: LLM) -> None:
    text = "What is a KV cache?"
    (got,) = llm.embed(text)
    assert len(got.vector) == llm.config.hidden_size and abs(length(got.vector) - 1) < 1e-5
    assert got.vector != llm.embed("What is a KV cache")[0].vector
    near, far = llm.embed(["What is a KV cache for?", "Tom and Lily went to the park."])
    dots = [sum(a * b for a, b in zip(got.vector, one.vector, strict=True)) for one in (near, far)]
    assert dots[0] > dots[1], "it says nothing of what a text is about"


def test_the_first_dimensions_are_a_shorter_vector_of_length_1(llm: LLM) -> None:
    whole, short = (llm.embed("a fox", dimensions=n)[0].vector for n in (None, 16))
    assert len(short) == 16 and abs(length(short) - 1) < 1e-5
    assert off(short, [x / length(whole[:16]) for x in whole[:16]]) < 1e-6


def alone(llm: LLM, pooling: Pooling) -> list[tuple[float, ...]]:
    """Each text's vector in an engine of its own, read at once."""
    settings = EngineSettings(kv_blocks=64, prefix_cache=False, async_scheduling=False)
    return [together(llm, settings, pooling, [text])[0] for text in TEXTS]


def together(
    llm: LLM, settings: EngineSettings, pooling: Pooling, texts: Sequence[str] = TEXTS, answers: int = 0
) -> list[tuple[float, ...]]:
    """The vectors of ``texts``; with ``answers`` beside them, which are more urgent, of each twice."""
    engine = llm.with_engine(settings).engine
    coming = sorted([*texts, *texts] if answers else texts, key=len, reverse=True)
    numbers: list[int] = []
    found: dict[int, array[float]] = {}
    given_way, give_way = Counter[int](), engine.scheduler._give_way

    def noted(entry: Place, step: StepPlan) -> None:
        given_way[entry.seq.id] += entry.seq.num_computed_tokens
        give_way(entry, step)

    engine.scheduler._give_way = noted  # type: ignore[method-assign]
    while len(numbers) < len(coming) or len(engine):
        if len(numbers) < len(coming):  # one comes a step
            ids = llm.tokenizer.encode(coming[len(numbers)])
            numbers.append(engine.add(ids, PoolingParams(pooling=pooling), priority=-(len(numbers) % 3)))
        for seed in range(answers if len(numbers) == 1 else 0):
            params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.5, seed=seed)
            engine.add(llm.tokenizer.encode(TEXTS[seed % 2]), params, priority=4)
        for number, chunk in engine.step():
            if chunk.completion is not None and number in numbers:
                assert chunk.completion.embedding is not None and chunk.completion.finish_reason == "stop"
                found[number] = chunk.completion.embedding
        engine.scheduler.check_integrity()
    if settings.kv_blocks == TIGHT:
        assert [number for number in numbers if given_way[number]], "the pool is too large to show anything"
    vectors: dict[str, set[tuple[float, ...]]] = {text: set() for text in texts}
    for text, number in zip(coming, numbers, strict=True):
        vectors[text].add(tuple(found[number]))
    assert all(len(own) == 1 for own in vectors.values()), "twice the same text gave two vectors"
    return [own.pop() for own in vectors.values()]


FEW_TOKENS, TIGHT = {"max_num_batched_tokens": 13, "max_num_seqs": 12}, 40


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "settings",
    [
        EngineSettings(kv_blocks=512),
        EngineSettings(kv_blocks=512, prefix_cache=False),
        EngineSettings(kv_blocks=512, scheduler=SchedulerSettings(**FEW_TOKENS)),
        EngineSettings(kv_blocks=512, speculate="draft"),
        EngineSettings(kv_blocks=TIGHT, scheduler=SchedulerSettings(**FEW_TOKENS, preemption="recompute")),
        EngineSettings(
            kv_blocks=TIGHT, host_blocks=64, scheduler=SchedulerSettings(**FEW_TOKENS, preemption="swap")
        ),
    ],
    ids=["roomy", "no prefix cache", "small chunks", "a draft model", "recompute", "swap"],
)
def test_a_vector_is_the_same_whatever_else_is_running(
    demo: Path, llm: LLM, pooling: Pooling, settings: EngineSettings
) -> None:
    own = LLM(demo, draft="demo-draft") if settings.speculate == "draft" else llm
    assert together(own, settings, pooling, answers=8) == alone(llm, pooling)


def test_who_generates_beside_it_gets_the_same_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30)
    prompts = [llm.tokenizer.encode(text) for text in TEXTS[:3]]
    expected = [completion.token_ids for completion in llm.generate(prompts, params)]
    engine = llm.with_engine(EngineSettings(kv_blocks=256)).engine
    numbers = [engine.add(ids, params) for ids in prompts]
    got: dict[int, list[int]] = {}
    while len(engine):
        if len(got) < 3:
            engine.add(llm.tokenizer.encode(TEXTS[4]), PoolingParams(pooling="mean"))
        for number, chunk in engine.step():
            if chunk.completion is not None and number in numbers:
                got[number] = chunk.completion.token_ids
    assert [got[number] for number in numbers] == expected


def test_a_prefix_is_found_where_only_the_last_state_counts(llm: LLM) -> None:
    own = llm.with_engine(EngineSettings(kv_blocks=64))
    own.generate(TEXTS[2], SamplingParams(max_tokens=1))
    assert own.embed(TEXTS[2])[0].cached_tokens > 100
    for _ in range(2):
        engine = own.engine
        engine.add(own.tokenizer.encode(TEXTS[2]), PoolingParams(pooling="mean"))
        while len(engine):
            ended = [chunk.completion for _, chunk in engine.step() if chunk.completion]
        assert ended[0].cached_tokens == 0, "a mean takes every token's state"


def test_a_mean_is_a_sum_in_order_wherever_it_was_cut() -> None:
    states = mx.random.normal((23, 40), key=mx.random.key(1))
    expected = states[0]
    for state in states[1:]:
        expected = expected + state
    expected = expected / 23
    for cuts in ([23], [1, 22], [7, 7, 9], [1] * 23):
        pool, at = Pool(PoolingParams(pooling="mean", normalize=False), 23), 0
        for cut in cuts:
            pool.take(states[at : at + cut])
            at += cut
        assert pool.is_whole and pool.vector() == array("f", memoryview(expected)), cuts


def test_what_was_computed_again_is_not_taken_twice() -> None:
    """A sequence that gave way begins anew, and its pool has the first of it already."""

    def rows(pool: Pool, start: int, count: int) -> list[range]:
        item = PlanItem(1, array("i", [0] * count), start, array("i"), 0)
        before = PlanItem(2, array("i", [0] * 4), 0, array("i"), 1)
        plan = Plan([before, item], 0, [], [], [])
        return [one.rows for one in pooled_rows(plan, lambda number: pool if number == 1 else None)]

    pool = Pool(PoolingParams(pooling="mean"), 12, tokens=5)
    assert (
        rows(pool, 0, 4) == [] and rows(pool, 0, 7) == [range(9, 11)] and rows(pool, 5, 7) == [range(4, 11)]
    )
    pool = Pool(PoolingParams(), 12)
    assert rows(pool, 0, 11) == [] and rows(pool, 11, 1) == [range(4, 5)]


def test_what_is_not_finite_is_an_error_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pool.take

    def broken(self: Pool, states: mx.array) -> None:
        real(self, states * (mx.nan if self.length < 6 else 1))

    monkeypatch.setattr(Pool, "take", broken)
    with pytest.raises(RequestError, match="not finite"):
        llm.embed(TEXTS[0])
    assert llm.engine.healthy and len(llm.embed(TEXTS[1])[0].vector)


@pytest.mark.parametrize(
    ("texts", "options", "what"),
    [
        ("", {}, "A text is empty"),
        (["a", ""], {}, "A text is empty"),
        ([[]], {}, "prompt is empty"),
        ([[3, -1]], {}, "Token id -1"),
        (["a", 5], {}, "must be a string or a list"),
        (3, {}, "must be a string or a list"),
        ("a", {"dimensions": 0}, "dimensions is 0"),
        ("a", {"dimensions": 257}, "dimensions is 257, but this model's vectors have 256"),
        ("a", {"prompt": "query"}, "has no prompt 'query'; it has: none"),
        ("a", {"prompt": "query", "instruction": "x"}, "both given"),
        ([[1, 2]], {"instruction": "x"}, "before|into your token ids"),
    ],
)
def test_what_cannot_be_embedded_is_said_before_anything_runs(
    llm: LLM, texts: Any, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(RequestError, match=what):
        llm.embed(texts, **options)
    assert not len(llm.engine)


def test_a_text_may_fill_the_context_but_not_more(demo: Path) -> None:
    llm = LLM(demo, max_context=32)
    assert llm.embed([[5] * 32])[0].prompt_tokens == 32
    with pytest.raises(ContextError, match=r"it has 33 tokens.*maximum context length is 32"):
        llm.embed([[5] * 33])


def test_a_plug_ins_model_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_model", lambda batch, kv: None)
    with pytest.raises(RequestError, match="does not show the hidden states"):
        llm.embed("a")


def run(demo: Path, work: Callable[[AsyncLLM], Any], **settings: Any) -> Any:
    async def use() -> Any:
        async with AsyncLLM(demo, engine=EngineSettings(kv_blocks=256, **settings)) as llm:
            return await work(llm)

    return asyncio.run(asyncio.wait_for(use(), 60))


def test_many_texts_at_once_beside_an_answer(demo: Path, llm: LLM) -> None:
    texts = [f"{TEXTS[n % 2]} {n}" for n in range(90)]

    async def work(own: AsyncLLM) -> tuple[list[TextEmbedding], int]:
        answer = asyncio.create_task(own.generate("What is a KV cache?", SamplingParams(max_tokens=20)))
        vectors = await own.embed(texts)
        return vectors, len((await answer)[0].token_ids)

    got, tokens = run(demo, work)
    assert [one.vector for one in got] == [one.vector for one in llm.embed(texts)] and tokens


def test_who_leaves_leaves_nothing_behind(demo: Path) -> None:
    async def work(own: AsyncLLM) -> None:
        task = asyncio.create_task(own.embed([TEXTS[2]] * 100))
        while not len(own.llm.engine):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await own.call(lambda llm: len(llm.engine)) == 0
        assert (await own.call(lambda llm: llm.engine.scheduler.usage())).used == 0

    run(demo, work)


def test_a_full_queue_is_said(demo: Path) -> None:
    scheduler = SchedulerSettings(max_num_seqs=1, max_queued_requests=2)

    async def work(own: AsyncLLM) -> None:
        with pytest.raises(BusyError):
            await own.embed(["a"] * 10)

    run(demo, work, scheduler=scheduler)


def test_figures_count_texts(llm: LLM) -> None:
    own = llm.with_engine(EngineSettings(kv_blocks=64))
    tokens = sum(one.prompt_tokens for one in own.embed(TEXTS[:2]))
    totals = own.engine.stats().totals
    assert (totals.prompt_tokens, totals.generation_tokens, totals.ends["stop"]) == (tokens, 0, 2)
