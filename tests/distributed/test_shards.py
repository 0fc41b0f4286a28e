"""One model on several ranks: every logit as on one, bit for bit, whatever the family, format and backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_llm.config import Quantization
from tiny_llm.data import Batch, Matrix, QuantizedTensor
from tiny_llm.distributed.group import ALONE, Alone, Group
from tiny_llm.errors import ConfigError
from tiny_llm.kv.dense import DenseCache
from tiny_llm.models.checkpoint import FolderCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.models.ranks import gathered_bytes
from tiny_llm.models.registry import load_config, parts_of
from tiny_llm.ops.backend import works

OnRanks = Callable[..., list[Any]]
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38]
BACKENDS = ["ref", pytest.param("cpu", marks=pytest.mark.skipif(not works(), reason="no CPU kernels here"))]
CASES = {
    2: (
        "qwen2_tied",
        "qwen2_untied_sharded",
        "qwen2_14_heads",
        "qwen3",
        "qwen2_moe",
        "ernie4_5_moe",
        "granite",
    ),
    3: ("gemma3", "phi3", "smollm3"),
    4: ("qwen2_tied", "qwen2_untied_sharded", "qwen3", "qwen2_moe"),
    5: ("gpt2", "llama_odd"),
}


def _steps(folder: Path, group: Group = ALONE, **options: Any) -> list[mx.array]:
    """Logits of a prompt and of three tokens one by one."""
    model, tokens = load_model(folder, group=group, **options), PROMPT
    cache, logits = DenseCache(model.config.num_layers), list[mx.array]()
    for new in (tokens, [4], [5], [6]):
        at = range(cache.length, cache.length + len(new))
        last = mx.array([len(new) - 1] if len(new) == 1 else [2, len(new) - 1])
        logits.append(model(Batch(mx.array(new), mx.array(list(at)), (0, len(new)), last), cache))
        mx.eval(logits[-1])
    return logits


def _off(
    folder: Path, size: int, backend: str, on_ranks: OnRanks, shares: Any = None, **options: Any
) -> list[str]:
    """Where logits are not those of one rank; with shares only rank 0 has some."""
    (alone,) = on_ranks(1, backend, lambda group: _steps(folder, **options))
    parts = on_ranks(size, backend, lambda group: _steps(folder, group, shares=shares, **options))
    parts = parts[:1] if shares else parts
    return [
        f"rank {rank} of {size}, step {step}: off by {mx.abs(got - want).max().item()}"
        for rank, steps in enumerate(parts)
        for step, (got, want) in enumerate(zip(steps, alone, strict=True))
        if not mx.array_equal(got, want).item()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantize": 4}], ids=str)
def test_logits_are_those_of_one_rank(
    golden: Path, size: int, backend: str, options: dict[str, Any], on_ranks: OnRanks
) -> None:
    names = CASES[size] if backend == "ref" or options != {"dtype": "bfloat16"} else CASES[size][:1]
    wrong = {name: _off(golden / name, size, backend, on_ranks, **options) for name in names}
    assert not any(wrong.values()), {name: what for name, what in wrong.items() if what}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": 4}], ids=str)
def test_logits_of_a_pipeline_are_those_of_one_rank(
    golden: Path, backend: str, options: dict[str, Any], on_ranks: OnRanks
) -> None:
    names = ("qwen2_yarn", "qwen2_untied_sharded", "qwen3_moe", "olmo2", "gemma3", "gpt2", "smollm3")
    wrong = {name: _off(golden / name, 2, backend, on_ranks, shares=(1, 1), **options) for name in names}
    assert not any(wrong.values()), {name: what for name, what in wrong.items() if what}


def _arrays(weight: Matrix) -> list[mx.array]:
    if isinstance(weight, QuantizedTensor):
        return [weight.packed, weight.scales, weight.biases]
    assert isinstance(weight, mx.array)
    return [weight]


def _rows(array: mx.array, rows: range) -> mx.array:
    return array[rows.start : rows.stop] if array.ndim < 3 else array[:, rows.start : rows.stop]


@pytest.mark.parametrize("quantize", [None, Quantization(8, 32)], ids=["as it is", "quantized"])
def test_a_rank_reads_the_rows_that_are_its_own(golden: Path, quantize: Quantization | None) -> None:
    how: dict[str, Any] = {"dtype": None, "quantize": quantize, "finish": lambda weight: weight}
    for size, names in CASES.items():
        for checkpoint in (FolderCheckpoint(golden / name) for name in names):
            whole, seen = checkpoint.tensors(**how), set[str]()
            for rank in range(size):
                parts = parts_of(checkpoint.config, Alone(rank, size))
                for name, own in checkpoint.tensors(**how, parts=parts).items():
                    kept = _arrays(whole[name])
                    want = [_rows(array, parts[name]) for array in kept] if name in parts else kept
                    same = map(mx.array_equal, _arrays(own), want)
                    assert all(one.item() for one in same), f"{checkpoint.config.model_type}: {name}"
                seen.update(parts)
            vectors = [name for name in whole.keys() - seen if whole[name].ndim > 1]
            assert all("gate" in name or "positions" in name for name in vectors), vectors


@pytest.mark.parametrize(
    ("case", "size", "told"),
    [
        ("qwen2_14_heads", 4, "4 ranks .* share 14 heads of queries and 2 of keys and values, .* 1, 2, 14"),
        ("olmo2", 5, "olmo2 cannot be split over ranks .*normed all together"),
        ("llama_odd", 2, "expected one of 1, 5"),
    ],
)
def test_who_cannot_share_a_model_is_told_why(golden: Path, case: str, size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_model(golden / case, group=Alone(0, size))


@pytest.mark.parametrize(
    ("case", "size"), [("qwen2_tied", 2), ("qwen3", 4), ("qwen2_moe", 2), ("gpt2", 5), ("ernie4_5_moe", 2)]
)
def test_as_many_bytes_travel_as_is_told(golden: Path, case: str, size: int, on_ranks: OnRanks) -> None:
    def run(group: Any) -> tuple[int, int]:
        _steps(golden / case, group, dtype="float32")
        return group.received, group.gathers

    told = gathered_bytes(load_config(golden / case), size)
    tokens, steps, rows = len(PROMPT) + 3, 4, 5
    want = told.token * tokens + told.logits * rows, told.gathers * steps
    assert on_ranks(size, "ref", run) == [want] * size
