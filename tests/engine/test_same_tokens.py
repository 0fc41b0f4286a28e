"""Same tokens, whatever the traffic: a request's output is that of the request alone, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm import LLM, BeamParams, Completion, SamplingParams
from tiny_llm.data import Plan
from tiny_llm.decoding import decide
from tiny_llm.decoding.decide import Decision
from tiny_llm.decoding.grammar import regex_grammar, schema_grammar
from tiny_llm.engine import open_requests
from tiny_llm.engine.budget import PoolLimit
from tiny_llm.engine.settings import EngineSettings, Speculation
from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.disk import BlockStore
from tiny_llm.sampling_params import Constraint
from tiny_llm.scheduler import drafts
from tiny_llm.scheduler.settings import SchedulerSettings

pytestmark = pytest.mark.slow

TOPICS = (
    "a KV cache",
    "paged attention",
    "a block table",
    "prefill",
    "continuous batching",
    "a fox",
    "34 + 25",
)
Ask = tuple[list[int], SamplingParams, int, int]
"""prompt, params, priority, the step at which it arrives"""
Told = tuple[list[int], str, str, list[dict[int, float]] | None, int, float | None]
"""Of an answer: its tokens, text, why it ended, log-probabilities, tokens that the text has, its score"""


class EvenThenOdd:
    """A form that remembers where it is: even ids and odd ones in turn, and the end at any time."""

    def __init__(self, vocab: int, ends: frozenset[int]) -> None:
        even = bytearray(b"\1\0" * (vocab // 2 + 1))[:vocab]
        self._masks = [bytes(even), bytes(1 - allowed for allowed in even)]
        self._masks = [bytes(a or i in ends for i, a in enumerate(mask)) for mask in self._masks]
        self._seen = 0

    def __call__(self, answer: list[int]) -> bytes:
        assert len(answer) >= self._seen, "an answer only grows"
        self._seen = len(answer)
        return self._masks[self._seen % 2]


class OverAt:
    """Ends an answer behind a word."""

    def __init__(self) -> None:
        self._text = ""

    def __call__(self, piece: str) -> bool:
        self._text += piece
        return "block" in self._text


def no_echo(tokens: list[int], logits: mx.array) -> mx.array:
    """A processor that depends on the last token: it is less likely to come again."""
    return logits - 2.0 * (mx.arange(logits.size) == tokens[-1])


@pytest.fixture(scope="module")
def llm(demo: Path) -> LLM:
    """The bundled model, on the best backend of this machine, and its draft model."""
    return LLM(demo, draft="demo-draft")


def drawn_params(llm: LLM, chance: random.Random) -> SamplingParams:
    """Every option that a request has, each of them now and then."""

    def sometimes(value: object, share: float = 0.25) -> Any:
        return value if chance.random() < share else None

    vocab, ends = llm.config.vocab_size, llm.end_ids
    form = chance.choice((None, None, None, lambda: EvenThenOdd(vocab, ends), *grammars(llm)))
    ends_late = form is None or isinstance(form(), EvenThenOdd)  # a grammar's answer ends where it does
    return SamplingParams(
        max_tokens=chance.randint(1, 48),
        temperature=chance.choice((0, 0, 0.8, 1.5)),
        top_k=chance.choice((0, 5)),
        top_p=chance.choice((1, 0.9)),
        min_p=chance.choice((0, 0, 0.1)),
        seed=chance.randrange(100),
        stop=sometimes(("cache", "block t", ".\n")) or (),
        stop_token_ids=sometimes(tuple(chance.sample(range(vocab), 40))) or (),
        ignore_eos=ends_late and chance.random() < 0.5,
        logprobs=sometimes(chance.randint(0, 3)),
        prompt_logprobs=sometimes(chance.randint(0, 2), 0.1),
        n=chance.choice((1, 1, 1, 3)),
        min_tokens=(ends_late and sometimes(chance.randint(1, 24))) or 0,
        repetition_penalty=chance.choice((1, 1, 1.2)),
        presence_penalty=chance.choice((0, 0, 0.5)),
        frequency_penalty=chance.choice((0, 0, 0.3)),
        logit_bias=chance.choice((None, {5: 2.0, 7: -3.0})),
        processors=sometimes((no_echo,), 0.15) or (),
        speculate=chance.random() < 0.8,
        prediction=sometimes(tuple(chance.choices(range(vocab), k=30))) or (),
        stopping=sometimes(OverAt),
        constraint=form,
    )


def grammars(llm: LLM) -> tuple[Callable[[], Constraint], ...]:
    """Forms as users ask for them."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}}}
    return llm.grammars.compile(schema_grammar(schema)), llm.grammars.compile(regex_grammar("[a-z ]{3,40}"))


def features(ask: Ask) -> frozenset[tuple[str, bool]]:
    """Which options a request makes use of, and which not."""
    _, params, priority, _ = ask
    used = {name: getattr(params, name) != getattr(SamplingParams(), name) for name in OPTIONS}
    grammar = params.constraint is not None and not isinstance(params.constraint(), EvenThenOdd)
    used |= {"sampled": params.temperature > 0, "priority": priority > 0, "grammar": grammar}
    used["search"] = isinstance(params, BeamParams)
    return frozenset(used.items())


def pairs(ask: Ask) -> set[frozenset[tuple[str, bool]]]:
    """Every two options together, each in use or not."""
    return {frozenset(two) for two in combinations(features(ask), 2)}


OPTIONS = {field.name for field in fields(SamplingParams)} - {"max_tokens", "temperature", "seed"}
IMPOSSIBLE = {
    frozenset({("grammar", True), ("constraint", False)}),
    *(frozenset({("grammar", True), (late, True)}) for late in ("min_tokens", "ignore_eos")),
    frozenset({("search", True), ("speculate", False)}),  # it never guesses
    *(frozenset({("search", True), (drawn, True)}) for drawn in ("sampled", "top_k", "top_p", "min_p")),
}


def as_search(params: SamplingParams, chance: random.Random) -> BeamParams:
    """A beam search with all else that ``params`` ask for."""
    given = {field.name: getattr(params, field.name) for field in fields(SamplingParams)}
    given |= {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "width": chance.randint(3, 5)}
    given |= {"length_penalty": chance.choice((0.6, 1, 1.4))}
    given |= {"early_stopping": chance.choice((True, False, "never"))}
    return BeamParams(**given)


def drawn_ask(llm: LLM, chance: random.Random, searches: float) -> Ask:
    """A random request, a beam search with that chance."""
    system = "You answer questions about serving language models. " * chance.choice((0, 1, 6))
    messages = [{"role": "user", "content": f"{system}What is {chance.choice(TOPICS)}?"}]
    prompt, params = llm.chat_prompt(messages), drawn_params(llm, chance)
    params = as_search(params, chance) if chance.random() < searches else params
    return prompt, params, chance.randint(-2, 2), chance.randint(0, 12)


def traffic(llm: LLM, seed: int, count: int, searches: float = 0) -> list[Ask]:
    """Random requests, some with a shared beginning; of each few, the one that has most of what is new."""
    chance = random.Random(seed)
    asks: list[Ask] = []
    seen: set[frozenset[tuple[str, bool]]] = set()
    for _ in range(count):
        few = [drawn_ask(llm, chance, searches) for _ in range(16)]
        asks.append(max(few, key=lambda ask: len(pairs(ask) - seen)))
        seen |= pairs(asks[-1])
    return asks


def told(ended: Completion) -> Told:
    tokens, logprobs = ended.token_ids, ended.logprobs
    return tokens, ended.text, ended.finish_reason, logprobs, ended.shown_tokens, ended.score


def alone(llm: LLM, asks: Sequence[Ask]) -> list[list[Told]]:
    """Each request by itself, nothing prepared ahead and nothing remembered between them."""
    settings = EngineSettings(kv_blocks=64, prefix_cache=False, async_scheduling=False, speculate="off")
    fresh = [llm.with_engine(settings) for _ in asks]
    return [
        [told(one) for one in own.generate(p, params)]
        for own, (p, params, _, _) in zip(fresh, asks, strict=True)
    ]


def together(llm: LLM, settings: EngineSettings, asks: Sequence[Ask]) -> list[list[Told]]:
    """All through one engine, each added at its step."""
    engine = llm.with_engine(settings).engine
    numbers: dict[int, int] = {}
    done: dict[int, list[Completion]] = {index: [] for index in range(len(asks))}
    step = 0
    while sum(map(len, done.values())) < sum(params.n for _, params, _, _ in asks):
        for index, (prompt, params, priority, at) in enumerate(asks):
            if at == step:
                numbers[engine.add(prompt, params, priority=priority)] = index
        for number, chunk in engine.step():
            if chunk.completion is not None:
                done[numbers[number]].append(chunk.completion)
        engine.scheduler.check_integrity()
        step += 1
        assert step < 5000, "the engine does not get on"
    assert not len(engine)
    return [[told(one) for one in sorted(own, key=lambda c: c.index)] for own in done.values()]


TINY, HOST = 14, 64
SETTINGS: Mapping[str, EngineSettings] = {
    "roomy": EngineSettings(kv_blocks=512),
    "roomy, nothing ahead": EngineSettings(kv_blocks=512, async_scheduling=False),
    "no prefix cache": EngineSettings(kv_blocks=512, prefix_cache=False),
    "blocks of 32": EngineSettings(kv_blocks=256, block_size=32),
    "small chunks": EngineSettings(
        kv_blocks=512, scheduler=SchedulerSettings(max_num_batched_tokens=9, max_num_seqs=8)
    ),
    "recompute": EngineSettings(kv_blocks=TINY, scheduler=SchedulerSettings(preemption="recompute")),
    "recompute, nothing ahead": EngineSettings(
        kv_blocks=TINY, async_scheduling=False, scheduler=SchedulerSettings(preemption="recompute")
    ),
    "swap": EngineSettings(kv_blocks=TINY, host_blocks=HOST, scheduler=SchedulerSettings(preemption="swap")),
    "swap, nothing ahead": EngineSettings(
        kv_blocks=TINY,
        host_blocks=HOST,
        async_scheduling=False,
        scheduler=SchedulerSettings(preemption="swap"),
    ),
    "slabs": EngineSettings(kv_blocks=512, slab_blocks=4),
    "no guesses": EngineSettings(kv_blocks=512, speculate="off"),
    "a draft model": EngineSettings(kv_blocks=512, speculate="draft"),
    "a draft model, small chunks": EngineSettings(
        kv_blocks=512,
        speculate="draft",
        scheduler=SchedulerSettings(max_num_batched_tokens=40, max_num_seqs=8),
    ),
    "a draft model, recompute": EngineSettings(
        kv_blocks=TINY, speculate="draft", scheduler=SchedulerSettings(preemption="recompute")
    ),
    "a draft model, swap": EngineSettings(
        kv_blocks=TINY, host_blocks=HOST, speculate="draft", scheduler=SchedulerSettings(preemption="swap")
    ),
}


@pytest.fixture(scope="module")
def asks(llm: LLM) -> list[Ask]:
    return traffic(llm, seed=7, count=26, searches=0.25)


@pytest.fixture(scope="module")
def expected(llm: LLM, asks: list[Ask]) -> list[list[Told]]:
    return alone(llm, asks)


def test_the_traffic_has_every_pair_of_options(asks: list[Ask]) -> None:
    """A new option that is not drawn here would not be known to keep its tokens, alone or beside another."""
    names = sorted(name for name, _ in features(asks[0]))
    either = (False, True)
    every = {
        frozenset({(a, on), (b, other)})
        for a, b in combinations(names, 2)
        for on in either
        for other in either
    }
    missing = every - set().union(*map(pairs, asks)) - IMPOSSIBLE
    assert not missing, sorted(map(sorted, missing))


@pytest.mark.parametrize("name", SETTINGS)
def test_traffic_changes_no_token(llm: LLM, name: str, asks: list[Ask], expected: list[list[Told]]) -> None:
    got = together(llm, SETTINGS[name], asks)
    wrong = [i for i in range(len(asks)) if got[i] != expected[i]]
    assert not wrong, f"{asks[wrong[0]][1]}: {got[wrong[0]]}, but alone {expected[wrong[0]]}"


@pytest.mark.parametrize("name", ["small chunks", "a draft model, swap"])
def test_traffic_changes_no_token_where_int8_is_kept(demo: Path, name: str) -> None:
    """Chunks, prefix hits, guesses and swaps read back what was rounded: so do those who wrote it."""
    llm = LLM(demo, draft="demo-draft", kv_dtype="int8")
    asks = traffic(llm, seed=8, count=10)
    assert together(llm, SETTINGS[name], asks) == alone(llm, asks)


@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_traffic_changes_no_token_where_memory_comes_and_goes(
    demo: Path, tmp_path: Path, kept: str, speculate: Speculation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used moves to the pool's front; what is cached goes to disk, and is found there."""
    chance, moved, found = random.Random(5), list[int](), list[bytes]()
    real_moved, real_read = BlockManager._moved, BlockStore.read

    def noted(self: BlockManager, block: int) -> int:
        moved.append(block)
        return real_moved(self, block)

    def read(self: BlockStore, content: bytes) -> bytes | None:
        data = real_read(self, content)
        if data is not None:  # from a file, or on its way to one: the writer's thread decides
            found.append(content)
        return data

    def by_chance(self: PoolLimit, capacity: int, *, again: bool = False) -> int:
        return chance.choice((TINY, 512))

    settings = replace(SETTINGS["slabs"], speculate=speculate)
    with LLM(demo, draft="demo-draft", kv_dtype=kept, kv_disk=tmp_path) as llm:
        asks = traffic(llm, seed=9, count=12, searches=0.25)
        expected = alone(llm, asks)
        monkeypatch.setattr(BlockManager, "_moved", noted)
        monkeypatch.setattr(PoolLimit, "blocks", by_chance)
        monkeypatch.setattr(BlockStore, "worth_reading", lambda self, computed_ms, within_ms: 512)
        monkeypatch.setattr(BlockStore, "read", read)
        for _ in range(2):
            assert together(llm, settings, asks) == expected
        disk = llm.engine.stats().disk
    assert len(moved) > 20 and len(found) > 4 and disk and disk.written, (len(moved), len(found), disk)


def test_64_others_change_no_token(llm: LLM) -> None:
    drawn = traffic(llm, seed=11, count=65, searches=0.25)
    asks = [(prompt, params, 0, 0) for prompt, params, _, _ in drawn]
    settings = EngineSettings(kv_blocks=1024, scheduler=SchedulerSettings(max_step_ms=1e9))
    assert together(llm, settings, asks) == alone(llm, asks)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_swap_brings_back_the_keys_and_values_that_went_out(
    stories260k: Path, backend: str, async_scheduling: bool
) -> None:
    """The copy to the host was evaluated when others had written the blocks: three of six answers changed."""
    llm = LLM(stories260k, dtype="float32", backend=backend)
    beginnings = ("Once upon a time", "Lily had a", "The dog", "A big red", "Tom and Sam", "One day")
    prompts = [llm.tokenizer.encode(text) for text in beginnings]
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    swap = SchedulerSettings(preemption="swap")
    small = EngineSettings(kv_blocks=24, host_blocks=64, async_scheduling=async_scheduling, scheduler=swap)
    tight, roomy = llm.with_engine(small), llm.with_engine(EngineSettings(kv_blocks=512))
    expected = [answer.token_ids for answer in roomy.generate(prompts, params)]
    assert [answer.token_ids for answer in tight.generate(prompts, params)] == expected
    assert tight.engine.scheduler.preempted["swap"] > 1, "the pool is too large to show anything"


@pytest.mark.parametrize("policy", ["recompute", "swap"])
def test_preemption_happens_here(llm: LLM, policy: str) -> None:
    """The two above prove nothing unless the pool is too small for them."""
    settings = SETTINGS[policy]
    own = llm.with_engine(settings)
    for prompt, params, _, _ in traffic(llm, 7, 48):
        own.engine.add(prompt, params)
    while len(own.engine):
        own.engine.step()
    assert own.engine.scheduler.preempted[policy] > 0


def test_a_key_that_depends_on_the_batch_is_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: noise that follows from the row's number in its batch."""
    asks = [(p, replace(s, temperature=1.0, seed=3, top_k=0), 0, 0) for p, s, _, _ in traffic(llm, 1, 12)]
    expected = alone(llm, asks)
    real = decide.sample

    def by_row(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
        return real(logits, [replace(p, seed=row) for row, p in enumerate(params)], positions)

    monkeypatch.setattr(decide, "sample", by_row)
    assert together(llm, SETTINGS["roomy"], asks) != expected


def test_sums_that_depend_on_the_batch_are_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: logits off by rounding, by as much as the batch has rows."""
    asks = [(p, replace(s, temperature=1.5, top_k=0, top_p=1.0), 0, 0) for p, s, _, _ in traffic(llm, 2, 48)]
    expected = alone(llm, asks)
    real = decide.sample

    def by_size(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
        noise = mx.random.normal(logits.shape, key=mx.random.key(len(params))) * 0.05 * (len(params) > 1)
        return real(logits + noise, params, positions)

    monkeypatch.setattr(decide, "sample", by_size)
    assert together(llm, SETTINGS["roomy"], asks) != expected


def with_predictions(asks: Sequence[Ask], expected: Sequence[Sequence[Told]], seed: int) -> list[Ask]:
    """The same requests, which predict their first answer but for every tenth token or so."""
    chance = random.Random(seed)
    found: list[Ask] = []
    for (prompt, params, *when), answers in zip(asks, expected, strict=True):
        guesses = tuple(3 if chance.random() < 0.1 else token for token in answers[0][0])
        found.append((prompt, replace(params, speculate=True, prediction=guesses), *when))
    return found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is guessed is checked, whether or not it pays."""
    monkeypatch.setattr(drafts.Worth, "length", lambda self, share, most: most)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [name for name, own in SETTINGS.items() if own.speculate != "off"])
def test_guesses_change_no_token(
    llm: LLM, name: str, asks: list[Ask], expected: list[list[Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong ones, checked beside chunks, forms, penalties, forks, with memory and without."""
    accepted: list[int] = []
    real = decide.by_sequence

    def counted(plan: Plan, decisions: Iterable[Decision]) -> list[tuple[int, list[Decision]]]:
        found = real(plan, decisions)
        accepted.extend(len(own) for _, own in found if own and own[-1].row.guesses)
        return found

    monkeypatch.setattr(open_requests, "by_sequence", counted)
    assert together(llm, SETTINGS[name], with_predictions(asks, expected, 3)) == expected
    assert len(accepted) > 20 and max(accepted) > 4, "hardly a guess was checked"


@pytest.mark.parametrize("name", ["a draft model, recompute", "a draft model, swap"])
def test_a_draft_model_that_is_the_model_is_never_wrong(
    demo: Path, name: str, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is moved, found, shared or thrown out: it has read all that comes before what it guesses.

    And it draws as answers do, with their forms and penalties.
    """
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(drafts.Worth, "length", lambda self, share, most: min(most, 3))
    monkeypatch.setattr(
        drafts.Acceptance, "observe", lambda self, drafted, accepted: seen.append((drafted, accepted))
    )
    guessed = [(p, replace(own, speculate=True, prediction=()), *when) for p, own, *when in asks[:16]]
    with LLM(demo, draft=demo, quantize=8) as same:  # as draft models are
        together(same, SETTINGS[name], guessed)
    assert len(seen) > 30, "hardly a guess was checked"
    assert all(drafted == accepted for drafted, accepted in seen)


@pytest.mark.usefixtures("eager")
def test_one_accepted_token_too_many_is_noticed(
    llm: LLM, asks: list[Ask], expected: list[list[Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: the first wrong guess counts as right."""
    real = decide._guessed_right

    def once_more(before: Sequence[Decision], row: decide.Row) -> bool:
        return real(before, row) or len(row.guesses) == 1

    monkeypatch.setattr(decide, "_guessed_right", once_more)
    assert together(llm, SETTINGS["roomy"], with_predictions(asks, expected, 3)) != expected


@pytest.mark.usefixtures("eager")
def test_a_noise_key_used_twice_is_noticed(
    llm: LLM, asks: list[Ask], expected: list[list[Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: every row of a draft draws with the noise of the draft's first."""
    real = decide.sample

    def first_key(logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]) -> mx.array:
        firsts: list[int] = []
        for n, position in enumerate(positions):
            goes_on = n > 0 and params[n] is params[n - 1] and position == positions[n - 1] + 1
            firsts.append(firsts[-1] if goes_on else position)
        return real(logits, params, firsts)

    monkeypatch.setattr(decide, "sample", first_key)
    assert together(llm, SETTINGS["roomy"], with_predictions(asks, expected, 3)) != expected


@pytest.mark.usefixtures("eager")
def test_a_rejected_token_in_the_prefix_cache_is_noticed(
    llm: LLM, asks: list[Ask], expected: list[list[Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: an answer's last token, which no step has computed, counts as computed when blocks stay.

    What lies there is the guess that it was not. A second turn begins with each answer, and finds it.
    """
    real = BlockManager.free

    def too_far(self: BlockManager, table: BlockTable, tokens: Sequence[int] = (), computed: int = 0) -> None:
        real(self, table, tokens, min(len(tokens), len(table.blocks) * self.block_size))

    guessed = with_predictions(asks, expected, 3)
    turns = [
        (prompt + answers[0][0] + [5], SamplingParams(max_tokens=8), 0, 60)
        for (prompt, *_), answers in zip(asks, expected, strict=True)
    ]
    both = [*expected, *alone(llm, turns)]
    assert together(llm, SETTINGS["roomy"], [*guessed, *turns]) == both
    monkeypatch.setattr(BlockManager, "free", too_far)
    assert together(llm, SETTINGS["roomy"], [*guessed, *turns]) != both
