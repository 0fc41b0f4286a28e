"""Operations of one decode step on backend mlx, beside those of mlx-lm for the same model.

What MLX has one kernel for on a GPU is built of many operations on its CPU device. Here each call of such a
kernel is one operation that takes the same arrays, for both sides; nothing of it is evaluated.
"""

from __future__ import annotations

import io
import re
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import utils as mlx_lm
from mlx_lm.models import qwen2, qwen3
from mlx_lm.models.cache import make_prompt_cache

from tiny_llm.data import Batch, Plan, PlanItem
from tiny_llm.engine.batch import build_batch
from tiny_llm.kv.paged import PagedCache
from tiny_llm.metalsim.build import why_not
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import Model
from tiny_llm.models.replay import Replay
from tiny_llm.ops import metal, swiglu
from tiny_llm.ops.backend import use
from tiny_llm.ops.kv_pool import KvFormat

BLOCK, PROMPT, FEW = 16, 37, 2
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
FAMILIES = {"qwen2": (qwen2, {}), "qwen3": (qwen3, {"head_dim": 32})}


def operations(result: mx.array) -> Counter[str]:
    """The operations that have yet to run for ``result``."""
    graph = io.StringIO()
    mx.export_to_dot(graph, result)
    return Counter(re.findall(r'label ?= ?"([^"]+)", shape=rectangle', graph.getvalue()))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation for each call of what is one kernel there."""

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return mx.depends(x, [weight])

    def rope(x: mx.array, *_: object, offset: int | mx.array, **given: object) -> mx.array:
        arrays = [one for one in (offset, given.get("freqs")) if isinstance(one, mx.array)]
        return mx.depends(x, arrays or [x])

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: object = None, **_: object) -> mx.array:
        return mx.depends(q, [k, v, *([mask] if isinstance(mask, mx.array) else [])])

    monkeypatch.setattr(mx.fast, "rms_norm", rms_norm)
    monkeypatch.setattr(mx.fast, "rope", rope)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(swiglu, "swiglu_mlx", swiglu.fused())


def theirs(family: str, layers: int, folder: Path) -> nn.Module:
    """mlx-lm's model, 4 bits in bfloat16, with ``layers`` layers; saved to ``folder``."""
    module, own = FAMILIES[family]
    config = {"model_type": family, "num_hidden_layers": layers, **SIZES, **own}
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    model, config = mlx_lm.quantize_model(model, config, 64, 4)
    mx.eval(model.parameters())
    mlx_lm.save_model(folder, model)
    mlx_lm.save_config(config | {"torch_dtype": "bfloat16"}, folder / "config.json")
    return model


def their_step(model: nn.Module, rows: int) -> mx.array:
    """Logits of a token after the prompt, not evaluated; ``rows`` sequences of one length."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((rows, PROMPT), mx.int32), cache=cache))
    mx.eval([layer.state for layer in cache])
    return model(mx.zeros((rows, 1), mx.int32), cache=cache)


def plan(rows: int, start: int, count: int) -> Plan:
    blocks = -(-(start + count) // BLOCK)
    tables = [array("i", range(4 * row, 4 * row + blocks)) for row in range(rows)]
    items = [PlanItem(row, array("i", [1] * count), start, table, 1) for row, table in enumerate(tables)]
    return Plan(items, 4 * rows, [], [], [])


def our_step(
    folder: Path, rows: int, drawn: mx.array | None = None, wrap: Callable[[Any], Model] = lambda model: model
) -> tuple[mx.array, Batch]:
    model = wrap(load_model(folder, dtype="bfloat16"))
    cache = PagedCache(KvFormat.of(model.config, BLOCK, mx.bfloat16), max_blocks=4 * rows)
    for start, count in ((0, PROMPT), (PROMPT, 1)):
        own = plan(rows, start, count)
        if start and drawn is not None:
            items = [item._replace(tokens=array("i", [-1 - row])) for row, item in enumerate(own.items)]
            own = Plan(items, own.num_blocks, [], [], [])
        batch = build_batch(own, BLOCK, drawn if start else None)
        cache.prepare(own)
        logits = model(batch, cache)
        if not start:
            mx.eval(logits, *(one for pool in cache._layers for one in pool))
    return logits, batch


@pytest.fixture
def a_layer(tmp_path: Path) -> Callable[[str, int], tuple[Counter[str], Counter[str]]]:
    """Operations of a layer, ours and mlx-lm's: the difference of models of 2 and of 4."""

    def count(family: str, rows: int) -> tuple[Counter[str], Counter[str]]:
        ours: dict[int, Counter[str]] = {}
        peers: dict[int, Counter[str]] = {}
        for layers in (FEW, 2 * FEW):
            folder = tmp_path / f"{family}-{layers}"
            folder.mkdir()
            peers[layers] = operations(their_step(theirs(family, layers, folder), rows))
            with use("mlx"):
                ours[layers] = operations(our_step(folder, rows)[0])

        def each(found: dict[int, Counter[str]]) -> Counter[str]:
            more = found[2 * FEW] - found[FEW]
            return Counter({name: number // FEW for name, number in more.items()})

        return each(ours), each(peers)

    return count


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("rows", "most"), [(1, 1.2), (4, 1.21)])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_layer(family: str, rows: int, most: float, a_layer) -> None:
    ours, peers = a_layer(family, rows)
    told = f"{ours.total()} {sorted(ours.items())}\nmlx-lm {peers.total()} {sorted(peers.items())}"

    assert ours.total() <= most * peers.total(), told
    casts = ours["AsType"] - peers["AsType"]
    assert casts <= 0, told


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_that_is_played_again_has_the_operations_of_the_model(tmp_path: Path) -> None:
    theirs("qwen3", FEW, tmp_path)
    with use("mlx"):
        built = operations(our_step(tmp_path, 4)[0])
        again = operations(our_step(tmp_path, 4, wrap=Replay)[0])
    for name in ("QuantizedMatmul", "Depends", "Gather"):
        assert again[name] == built[name], name
    assert again.total() <= built.total(), "what is small may only be joined"


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("rows", [1, 4])
def test_dispatches_of_a_layer_on_our_kernels(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine kernels and no operation of MLX's that moves a number; mlx-lm dispatches 20 for the same layer."""

    def stand_in(text: metal.Text, _mode: str) -> Callable[..., list[mx.array]]:
        def call(
            *,
            inputs: list[mx.array],
            output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype],
            **_: object,
        ) -> list[mx.array]:
            names.append(text.name)
            outputs = [
                mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            mx.eval(outputs)
            return mx.depends(outputs, [one for one in inputs if isinstance(one, mx.array)])

        return call

    names: list[str] = []
    monkeypatch.setattr(metal, "_made", stand_in)
    found: dict[int, Counter[str]] = {}
    for layers in (FEW, 2 * FEW):
        folder = tmp_path / str(layers)
        folder.mkdir()
        theirs("qwen2", layers, folder)
        with use("metalsim"):
            found[layers] = operations(our_step(folder, rows)[0])
    more = found[2 * FEW] - found[FEW]
    moved = {name: number // FEW for name, number in more.items() if name not in ("Reshape", "Depends")}
    assert not moved, "operations of MLX's beside the kernels"
    assert more["Depends"] == 9 * FEW, sorted(names)


@pytest.mark.parametrize("rows", [1, 4])
def test_building_a_step_evaluates_nothing(rows: int, tmp_path: Path) -> None:
    """What is read on the way is the host's; tokens that are still being drawn stay so."""
    theirs("qwen2", FEW, tmp_path)
    drawn = mx.sort(mx.zeros((rows,), mx.uint32))
    with use("mlx"):
        logits, batch = our_step(tmp_path, rows, drawn)
    assert operations(logits)["Sort"] == 1, "the tokens were waited for"
    assert batch.pages is not None
    pages = batch.pages
    for name in ("slot_mapping", "block_tables", "query_start_loc", "context_lens"):
        assert not operations(getattr(pages, name)), f"{name} is to be computed first"
    assert logits.shape == (rows, SIZES["vocab_size"])
