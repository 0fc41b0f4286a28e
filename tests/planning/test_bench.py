"""What bench measures is what it says: rows, steps and sequences are counted here as the engine runs them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, Plan
from tiny_llm.engine.llm import LLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.engine.trace import Trace
from tiny_llm.errors import CapacityError, ConfigError, RequestError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.planning.bench import Task, bench, measure


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo")


class Watcher(Trace):
    """Remembers each step: the tokens that go in, a sequence each, and where they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[int, int]]] = []

    def step(self, plan: Plan, began: float, ended: float) -> None:
        self.steps.append([(len(item.tokens), item.start) for item in plan.items])


def watched(llm: LLM, task: Task) -> list[list[tuple[int, int]]]:
    """The steps of measuring on an engine of its own, after those that warm up."""
    own = llm.with_engine(EngineSettings(kv_blocks=64))
    own.engine.trace = watcher = Watcher()
    speed = measure(own, task)
    assert speed.prefill_tok_s > 0 and speed.decode_tok_s > 0
    assert speed.ttft_s == pytest.approx(task.batch * task.prompt_tokens / speed.prefill_tok_s)
    whole = [(task.prompt_tokens, 0)] * task.batch
    assert len(own.engine) == 0 and not own.engine.totals.failed_steps
    return watcher.steps[watcher.steps.index(whole) :]


def test_one_sequence_is_prompt_then_tokens(llm: LLM) -> None:
    steps = watched(llm, Task(prompt_tokens=20, new_tokens=4, rounds=1))
    assert steps == [[(20, 0)], [(1, 19)], [(1, 20)], [(1, 21)], [(1, 22)]], (
        "the prompt as nobody has seen it; then once more, all but its last token from the prefix cache"
    )


def test_a_batch_steps_together_and_each_round_has_prompts_of_its_own(llm: LLM) -> None:
    steps = watched(llm, Task(prompt_tokens=20, new_tokens=3, batch=3, rounds=2))
    one_round = [[(20, 0)] * 3, [(1, 19)] * 3, [(1, 20)] * 3, [(1, 21)] * 3]
    assert steps == one_round * 2, "a round that finds its prompts in the prefix cache measures nothing"


def test_what_does_not_fit_is_said_before_it_runs(llm: LLM) -> None:
    own = llm.with_engine(EngineSettings(kv_blocks=8))
    with pytest.raises(
        CapacityError, match=r"3 sequences of 40 tokens take 9 blocks, but there is memory for 8"
    ):
        measure(own, Task(prompt_tokens=30, new_tokens=10, batch=3))
    assert own.engine.totals.steps == 0


def test_the_row_says_what_was_run() -> None:
    row = bench(Task(prompt_tokens=8, new_tokens=2, rounds=1), "demo", quantize=8, backend="ref")
    assert (row["model"], row["quantize"], row["backend"], row["isa"]) == ("demo", 8, "ref", None)
    assert row["threads"] is None
    assert isinstance(row["peak_memory_bytes"], int)
    for figure in ("prefill_tok_s", "decode_tok_s", "ttft_s", "load_s"):
        value = row[figure]
        assert isinstance(value, float) and value > 0, figure


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "rounds"])
def test_work_that_is_none(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is 0, but must be from"):
        Task(**{name: 0})  # type: ignore[arg-type]


def test_more_tokens_than_the_context() -> None:
    with pytest.raises(
        RequestError, match=r"new_tokens are 1025 together, but the model's context is 1024\."
    ):
        bench(Task(prompt_tokens=1000, new_tokens=25), "demo")


def test_dummy_weights_are_of_short_names() -> None:
    with pytest.raises(ConfigError, match=r"no short name 'qwen2-0\.6b'.* Did you mean"):
        bench(Task("dummy"), "qwen2-0.6b")


def test_a_dummy_model_gives_finite_logits() -> None:
    model = load_model(DummyCheckpoint("qwen2-0.5b"), quantize=4)
    one = mx.zeros(1, mx.int32)
    logits = model(Batch(one, one, (0, 1), one), NoCache())
    assert logits.shape == (1, 151936)
    assert 0.01 < mx.std(logits).item() < 100
