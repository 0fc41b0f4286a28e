"""Each golden model on the CPU kernels: a row's bits depend on its sequence alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Batch
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use, works

pytestmark = pytest.mark.skipif(not works(), reason="the CPU kernels were not built: no C++ compiler")


def test_neither_others_nor_chunks_change_a_bit(folder: Path, make_batch) -> None:
    tokens = [(7 * i + 3) % 60 for i in range(23)]
    with use("cpu"):
        model = load_model(folder)
        alone = model(make_batch(tokens), NoCache())
        among = model(make_batch([4, 5, 6], tokens, [9] * 30), NoCache())[3:26]
        assert mx.array_equal(alone, among).item(), "what else is in the batch shows"
        cache, start, outs = DenseCache(model.config.num_layers), 0, []
        for size in (1, 9, 1, 12):
            rows = mx.arange(start, start + size)
            outs.append(model(Batch(mx.array(tokens)[rows], rows, (0, size), mx.arange(size)), cache))
            start += size
        assert mx.array_equal(alone, mx.concatenate(outs)).item(), "how a prompt is cut into chunks shows"
