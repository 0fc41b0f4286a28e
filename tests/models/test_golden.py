"""Each golden model, layer by layer and in its logits, as transformers computes it in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Batch
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.ops.backend import use, works

pytestmark = [pytest.mark.chapter("1.5"), pytest.mark.usefixtures("backend")]
Greedy = Callable[[Model, Sequence[int], int], list[int]]
TOLERANCE = 1e-4  # relative to the largest value; on a CPU we are within 2e-6


@pytest.fixture(scope="module", params=["ref", "cpu", "mlx"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that these models tell apart, in turn; the CPU kernels where they were built."""
    if request.param == "cpu" and not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    with use(request.param) as name:
        yield name


@pytest.fixture(scope="module")
def model(backend: str, folder: Path) -> Decoder:
    loaded = load_model(folder, dtype="float32")
    assert isinstance(loaded, Decoder)
    return loaded


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "activations.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def batch_at(seen: dict[str, mx.array], positions: str = "positions") -> Batch:
    T = seen["tokens"].size
    return Batch(seen["tokens"], seen[positions], (0, T), mx.arange(T))


def test_every_case_is_tested(golden: Path, cases: tuple[str, ...]) -> None:
    of_plugins = {"starcoder2"}  # see test_plugin_file.py
    assert {path.name for path in golden.iterdir() if path.is_dir()} == set(cases) | of_plugins


def test_layer_by_layer(model: Decoder, seen: dict[str, mx.array], off) -> None:
    """The first layer that differs is named, since every later one then differs too."""
    batch, cache = batch_at(seen), NoCache()
    assert off(model.embed_tokens(batch.tokens, batch.positions), seen["hidden.0"]) < TOLERANCE, (
        "the embedding differs"
    )
    first = model.layers[0]
    attention = first.self_attn(first.input_layernorm(seen["hidden.0"]), batch, cache)
    assert off(attention, seen["layer0.attention"]) < TOLERANCE, "attention of layer 0 differs"
    for i, layer in enumerate(model.layers):
        x, residual = layer(seen[f"hidden.{i}"], None, batch, cache)
        error = off(x + residual, seen[f"hidden.{i + 1}"])
        assert error < TOLERANCE, f"layer {i} is the first to differ, by {error:.2g}"
    logits = model.lm_head(model.norm(seen[f"hidden.{len(model.layers)}"]))
    assert off(logits, seen["logits"]) < TOLERANCE, "the last norm or the head differs"


def test_logits(model: Decoder, seen: dict[str, mx.array], off) -> None:
    logits = model(batch_at(seen), NoCache())
    assert logits.dtype == mx.float32
    error = off(logits, seen["logits"])
    assert error < TOLERANCE, f"off by {error:.2g} of the largest logit; see which layer differs first"


def test_greedy_ids(model: Decoder, seen: dict[str, mx.array], greedy: Greedy) -> None:
    wanted: list[int] = seen["greedy"].tolist()  # type: ignore[assignment]
    prompt: list[int] = seen["tokens"][:4].tolist()  # type: ignore[assignment]
    assert greedy(model, prompt, len(wanted)) == wanted


def test_positions_with_an_offset_and_gaps(model: Decoder, seen: dict[str, mx.array], off) -> None:
    assert off(seen["gap.logits"], seen["logits"]) > 0.01, "these files cannot show a mistake in positions"
    logits = model(batch_at(seen, "gap.positions"), NoCache())
    assert off(logits, seen["logits"]) > TOLERANCE, "positions are ignored"
    assert off(logits, seen["gap.logits"]) < TOLERANCE, "positions are not those of the batch"


@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (4, 3)])
def test_a_cache_changes_nothing(
    model: Decoder, seen: dict[str, mx.array], chunks: tuple[int, ...], off
) -> None:
    cache, outs, start = DenseCache(model.config.num_layers), [], 0
    for size in chunks:
        rows = slice(start, start + size)
        tokens, positions = seen["tokens"][rows], seen["gap.positions"][rows]
        outs.append(model(Batch(tokens, positions, (0, size), mx.arange(size)), cache))
        start += size
    assert off(mx.concatenate(outs), seen["gap.logits"]) < TOLERANCE


def test_only_wanted_rows_reach_the_head(model: Decoder, seen: dict[str, mx.array], off) -> None:
    batch = batch_at(seen)
    rows = mx.array([6, 2])
    got = model(replace(batch, logit_rows=rows), NoCache())
    assert off(got, seen["logits"][rows]) < TOLERANCE
    assert model(replace(batch, logit_rows=mx.zeros((0,), mx.int32)), NoCache()).shape[0] == 0
    normed: list[int] = []

    def watched(x: mx.array) -> mx.array:
        normed.append(x.shape[0])
        return model.norm(x)

    replace(model, norm=watched)(replace(batch, logit_rows=rows), NoCache())  # type: ignore[arg-type]
    assert normed == [2], "the last norm and the head see those rows alone"
