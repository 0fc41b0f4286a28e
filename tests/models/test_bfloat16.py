"""Each family in bfloat16: nothing becomes float32 on the way, and a graph played again is the same."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Batch
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.models.replay import Replay
from tiny_llm.ops.backend import isa, use, works


@pytest.mark.parametrize("backend", ["ref", "mlx"])
@pytest.mark.parametrize("case", ["gpt2", "phi3_long", "smollm3", "olmo2", "granite", "gemma3"])
def test_it_stays_bfloat16(golden: Path, case: str, backend: str, off) -> None:
    """Where norms are wide, queries are scaled, or a scale is a number of Python's."""
    seen = mx.load(str(golden / case / "activations.safetensors"))
    assert isinstance(seen, dict)
    T = seen["tokens"].size
    batch = Batch(seen["tokens"], seen["positions"], (0, T), mx.arange(T))
    with use(backend):
        model = load_model(golden / case, dtype="bfloat16")
        assert isinstance(model, Decoder)
        first = model.layers[0]
        x = first.input_layernorm(model.embed_tokens(batch.tokens, batch.positions))
        for part in first.self_attn.heads(x, batch.positions):
            assert part.dtype == mx.bfloat16, "attention would read it beside keys of another dtype"
        logits = model(batch, NoCache())
        assert logits.dtype == mx.bfloat16 and off(logits, seen["logits"]) < 0.05
        assert mx.array_equal(Replay(model)(batch, NoCache()), logits).item()


@pytest.mark.skipif(not works(), reason="the CPU kernels were not built: no C++ compiler")
def test_who_asks_for_float32_gets_it_from_bfloat16_weights(golden: Path) -> None:
    """Only without, and only where the processor is fast with it, is what meets them rounded."""
    tokens = mx.arange(9)
    batch = Batch(tokens, tokens, (0, 9), tokens)
    with use("cpu"):
        exact, wide, rounded = (
            load_model(golden / "qwen3", **options)(batch, NoCache())
            for options in ({"activations": "exact"}, {"dtype": "float32"}, {})
        )
        assert mx.array_equal(exact, wide).item()
        assert mx.array_equal(rounded, wide).item() == (isa() != "avx512bf16")
