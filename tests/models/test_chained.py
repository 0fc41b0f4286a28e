"""What the CPU kernels play again as one operation is what the model does, bit for bit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.kv.paged import PagedCache
from tiny_llm.models import replay
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.models.replay import MOST_TOKENS, Chained, played
from tiny_llm.ops.backend import cpu, use, works
from tiny_llm.ops.kv_pool import KvFormat

SIZE = 16


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    if not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    with use("cpu"):
        yield


@pytest.fixture
def model(golden: Path) -> Decoder:
    return load(golden / "qwen3")


class Counted:
    """Counts the chains that are made in a block, and what was said where one could not be."""

    def __init__(self) -> None:
        self.made = 0
        self.refused: list[str] = []

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(replay, "cpu", self)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def Chain(self, inputs: list[mx.array], outputs: list[mx.array]) -> cpu.Chain:
        """In the place of the module's."""
        try:
            chain = cpu.Chain(inputs, outputs)
        except ValueError as error:
            self.refused.append(str(error))
            raise
        self.made += 1
        return chain


def load(folder: Path) -> Decoder:
    loaded = load_model(folder, dtype="float32")
    assert isinstance(loaded, Decoder)
    return loaded


def plans(vocab: int) -> Iterator[Plan]:
    """A prompt in two chunks, one beside another's; steps of both, in a pool that grows; then many tokens."""
    steps = [[(0, 0, 5)], [(0, 5, 2), (1, 0, 3)], [(0, 7, 1), (1, 3, 1)], [(0, 8, 1), (1, 4, 1)], [(1, 5, 1)]]
    steps += [[(0, 9, MOST_TOKENS + 1)], [(0, MOST_TOKENS + 10, MOST_TOKENS)], [(0, 2 * MOST_TOKENS + 10, 1)]]
    for number, step in enumerate(steps):
        blocks = 12 if number < 4 else 20
        items = []
        for seq_id, start, count in step:
            tokens = array("i", [(7 * p + seq_id) % vocab for p in range(start, start + count)])
            table = array("i", range(seq_id, 2 * -(-(start + count) // SIZE), 2))
            items.append(PlanItem(seq_id, tokens, start, table, count if number % 2 else 1))
        yield Plan(items, blocks, [], [], [])


def run(model: Model, config: Decoder, dtype: mx.Dtype) -> list[mx.array]:
    """Logits of all steps and, last, what the cache holds then; each step is built while others run."""
    cache, outs = PagedCache(KvFormat.of(config.config, SIZE, dtype), max_blocks=20), []
    for plan in plans(config.config.vocab_size):
        cache.prepare(plan)
        outs.append(model(build_batch(plan, SIZE), cache))
        mx.async_eval(outs[-1])
    return [*outs, *cache.arrays()]


def test_each_family_gives_the_same_bits(golden: Path, cases: tuple[str, ...]) -> None:
    for case in cases:
        model, built = load(golden / case), Counted()
        with built:
            again = run(Chained(model), model, mx.float32)
        for got, expected in zip(again, run(model, model, mx.float32), strict=True):
            assert mx.array_equal(got, expected).item(), case
        assert not built.refused and built.made, case


def test_attention_that_looks_at_the_pages(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read while the graph is built is not in it: then it is built anew in every step."""
    monkeypatch.setattr("tiny_llm.ops.paged_attention.on_cpu", lambda *_: False)
    built = Counted()
    with built:
        again = run(Chained(model), model, mx.float32)
    for got, expected in zip(again, run(model, model, mx.float32), strict=True):
        assert mx.array_equal(got, expected).item()
    (refused,) = built.refused
    assert built.made == 0 and "expected inputs that are read in the graph alone" in refused


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.int8])
def test_each_kind_of_pool_gives_the_same_bits(model: Decoder, dtype: mx.Dtype) -> None:
    for got, expected in zip(run(Chained(model), model, dtype), run(model, model, dtype), strict=True):
        assert mx.array_equal(got, expected).item()


def test_each_thread_has_chains_of_its_own(model: Decoder) -> None:
    """A second thread's request died of it: "There is no Stream(cpu, 0) in current thread"."""
    again, expected = Chained(model), run(model, model, mx.float32)
    mx.eval(expected)

    def same() -> bool:
        pairs = zip(run(again, model, mx.float32), expected, strict=True)
        return all(mx.array_equal(got, one).item() for got, one in pairs)

    for _ in range(3):
        with ThreadPoolExecutor(1) as thread:
            assert same() and thread.submit(same).result()


def test_a_step_of_shapes_that_were_there_builds_nothing(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Chained(model)
    first = run(again, model, mx.float32)
    monkeypatch.setattr(Decoder, "__call__", lambda *_: pytest.fail("the model was asked"))
    cache = PagedCache(KvFormat.of(model.config, SIZE, mx.float32), max_blocks=20)
    for plan, expected in zip(islice(plans(model.config.vocab_size), 5), first, strict=False):
        cache.prepare(plan)
        assert mx.array_equal(again(build_batch(plan, SIZE), cache), expected).item()


def test_chains_are_bounded(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_KEPT", 2)
    again, built = Chained(model), Counted()
    with built:
        run(again, model, mx.float32)
        run(again, model, mx.float32)
    assert built.made > 6 and len(again._chains) == 2


def test_where_there_are_no_pages_the_model_is_asked(model: Decoder) -> None:
    tokens = mx.arange(3)
    batch = Batch(tokens, tokens, (0, 3), tokens)
    assert mx.array_equal(Chained(model)(batch, NoCache()), model(batch, NoCache())).item()


def test_it_is_played_on_the_kernels_alone(model: Decoder) -> None:
    assert isinstance(played(model), Chained)
    with use("ref"):
        assert played(model) is model


def test_a_chain_says_what_it_cannot_be() -> None:
    x, weight = mx.ones((2, 4)), mx.ones(4)
    mx.eval(x, weight)
    normed = cpu.rms_norm(x, weight, 1e-6)
    with pytest.raises(
        ValueError, match=r"expected inputs that are read in the graph alone, got int32 \[3\]"
    ):
        cpu.Chain([x, mx.arange(3)], [normed])
    chain = cpu.Chain([x], [normed])
    for inputs in ([], [mx.ones((3, 4))], [mx.ones((2, 4), mx.int32)]):
        with pytest.raises(ValueError, match="expected inputs like those"):
            chain(inputs)


def test_a_chain_of_kernels_and_of_what_is_mlx_s() -> None:
    """Outputs may be inputs, constants, twice the same, and in other shapes than the kernels give."""
    x, weight, row = mx.random.normal((4, 8)), mx.random.normal((8,)), mx.random.normal((8, 4))
    mx.eval(x, weight, row)

    def outputs(x: mx.array) -> list[mx.array]:
        first = cpu.rms_norm(x, row.T.reshape(-1)[:8], 1e-6) + x
        second = cpu.rms_norm(first.reshape(2, 2, 8), weight, 1e-6)
        total, normed = cpu.add_rms_norm(second.reshape(4, 8), first, weight, 1e-6)
        return [normed[:, ::2], second, x, weight, total.reshape(-1), total, cpu.softmax(normed.T), normed]

    chain = cpu.Chain([x], outputs(x))
    for other in (x, mx.random.normal((4, 8)), mx.random.normal((8, 4)).T):
        for got, expected in zip(chain([other]), outputs(mx.contiguous(other)), strict=True):
            assert got.shape == expected.shape and mx.array_equal(got, expected).item()


def test_a_chain_of_one_value_read_late_and_of_inputs_out_of_order() -> None:
    """What a kernel gave stays until its last reader; inputs that do not lie in row order are copied."""
    x, weight = mx.random.normal((4, 8)), mx.random.normal((8,))
    mx.eval(x, weight)
    first = late = cpu.rms_norm(x, weight, 1e-6)
    for _ in range(5):
        late = cpu.rms_norm(late, weight, 1e-6)
    total, normed = cpu.add_rms_norm(first, late, weight, 1e-6)
    chain = cpu.Chain([x], [total, normed])
    turned = mx.random.normal((8, 4))
    mx.eval(turned)
    expected = mx.contiguous(turned.T)
    steps = [cpu.rms_norm(expected, weight, 1e-6)]
    for _ in range(5):
        steps.append(cpu.rms_norm(steps[-1], weight, 1e-6))
    wanted = cpu.add_rms_norm(steps[0], steps[-1], weight, 1e-6)
    for got, one in zip(chain([turned.T]), wanted, strict=True):
        assert mx.array_equal(got, one).item()


def test_who_waits_for_the_cache_alone_finds_the_step_in_it(model: Decoder) -> None:
    """What a step has written comes of it: nobody need ask for its logits first."""
    caches = [PagedCache(KvFormat.of(model.config, SIZE, mx.float32), max_blocks=20) for _ in range(2)]
    plan = next(plans(model.config.vocab_size))
    for cache, used in zip(caches, (Chained(model), model), strict=True):
        cache.prepare(plan)
        mx.eval(cache.arrays())
        used(build_batch(plan, SIZE), cache)
    for got, expected in zip(*(cache.arrays() for cache in caches), strict=True):
        assert mx.array_equal(got, expected).item() and mx.any(got != 0).item()


def test_a_constant_that_does_not_lie_in_row_order() -> None:
    x, weight = mx.random.normal((4, 8)), mx.random.normal((8, 2))[:, 0]
    mx.eval(x, weight)
    (got,) = cpu.Chain([x], [cpu.rms_norm(x, weight, 1e-6)])([x])
    assert mx.array_equal(got, cpu.rms_norm(x, mx.contiguous(weight), 1e-6)).item()
