"""A plan against the engine that is then started; the command as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import mlx.core as mx
import pytest

from tiny_llm import LLM, cli
from tiny_llm.engine.settings import BLOCK_SIZE
from tiny_llm.memory import available_memory_bytes
from tiny_llm.models.footprint import training_bytes
from tiny_llm.models.loading import weight_bytes
from tiny_llm.planning.memory import MemoryPlan, find_config, largest, plan_memory
from tiny_llm.planning.memory_report import as_svg, size, verdict
from tiny_llm.weights.hub import resolve
from tiny_llm.weights.names import config_of


@pytest.mark.chapter("0.2")
@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, 4])
def test_a_plan_is_what_the_engine_then_has(backend: str, quantize: int | None) -> None:
    plan = plan_memory("demo", available=10**9, quantize=quantize, context=1000, batch=3)
    llm = LLM("demo", backend=backend, quantize=quantize, kv_memory=plan.need.kv)
    assert llm.engine.settings.kv_blocks * llm.engine.cache.format.block_bytes == plan.need.kv
    assert llm.engine.settings.kv_blocks == 3 * -(-1000 // BLOCK_SIZE), "a last block may be part empty"
    assert abs(weight_bytes(llm._model) - plan.need.weights) <= 4 * llm.config.head_dim
    assert str(llm.engine.cache.format.dtype).endswith(plan.kv_dtype)


def test_buffers_that_mlx_keeps_are_a_part_of_the_plan() -> None:
    """0.54 GB that were there and in no plan."""
    LLM("demo")
    limit = mx.set_cache_limit(2**29)
    need = plan_memory("demo", available=available_memory_bytes()).need
    assert need.most == need.weights + need.kv + need.activations + need.program + need.buffers
    assert need.buffers == pytest.approx(limit, rel=0.1), "what is available is not always the same"
    assert plan_memory("demo", available=6 * 10**8).need.buffers == 75_000_000


@pytest.mark.chapter("0.2")
def test_the_largest_is_the_last_that_fits() -> None:
    for last in (0, 1, 2, 7, 99, 100):
        tried: list[int] = []

        def fits(n: int, last: int = last, tried: list[int] = tried) -> bool:
            tried.append(n)
            assert len(tried) <= 8, f"tried {tried}: halve the range each time"
            return n <= last

        assert largest(fits, 100) == last
        assert all(1 <= n <= 100 for n in tried), (
            "0 of anything, and more than there may be, are not asked for"
        )


@pytest.mark.chapter("0.2")
@pytest.mark.parametrize("available", [10**6, 10**8, 10**9, 16 * 10**9])
@pytest.mark.parametrize("model", ["demo", "qwen2-1.5b"])
def test_one_more_does_not_fit(model: str, available: int) -> None:
    plan = plan_memory(model, available=available, quantize=4, context=512, batch=2)

    def with_batch(batch: int) -> MemoryPlan:
        return plan_memory(model, available=available, quantize=4, context=512, batch=batch)

    def with_context(context: int) -> MemoryPlan:
        return plan_memory(model, available=available, quantize=4, context=context, batch=2)

    assert plan.fits == (plan.largest_batch >= 2) == (plan.largest_context >= 512)
    assert not with_batch(plan.largest_batch + 1).fits
    assert not plan.largest_batch or with_batch(plan.largest_batch).fits
    if plan.largest_context < find_config(model).max_position_embeddings:
        assert not with_context(plan.largest_context + 1).fits
    assert not plan.largest_context or with_context(plan.largest_context).fits


def test_a_config_comes_from_names_folders_and_files(tmp_path: Path) -> None:
    expected = find_config("qwen2-1.5b")
    assert expected == find_config("Qwen/Qwen2-1.5B-Instruct") == find_config("QWEN2-1.5B")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("qwen2-1.5b")))
    other = path.rename(tmp_path / "other.json")
    assert find_config(str(other)) == expected
    assert find_config(str(resolve("demo"))) == find_config("demo")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``main.py memory`` here."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["memory", *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_command_tells_and_draws(call: Call, tmp_path: Path, backend: str) -> None:
    token, kept = {"ref": ("256 KiB", "4.29 GB"), "cpu": ("128 KiB", "2.15 GB")}[backend]
    svg = tmp_path / "memory.svg"
    asked = "--model llama-3-8b --quantize 4 --batch 2 --context 8192 --memory 16GB --backend"
    code, out, _ = call(*asked.split(), backend, "--svg", str(svg))
    told = " ".join(out.split())
    assert code == 0 and "8.03 B parameters" in told and f"{token} a token" in told, told
    assert f"keys and values {kept}" in told and "16.00 GB of memory: it fits." in told, told
    assert "Adam's moments 64.24 GB" in told and "does not fit" in told, told
    texts = [element.text for element in ElementTree.parse(svg).iter() if element.tag.endswith("text")]
    assert "memory: 16.00 GB" in texts and f"keys and values {kept}" in texts


def test_several_ranks_are_told_what_travels(call: Call) -> None:
    code, out, _ = call("--model", "qwen2-0.5b", "--ranks", "2", "--batch", "4", "--dtype", "float32")
    *_, told, slow, fast = out.splitlines()
    # A layer of 896 + 896 + 4,864 + 896 floats, of which half is lacking; then the embedding, the head.
    layer = 2 * (896 + 896 + 4864 + 896) / 2
    assert code == 0 and f"{2 * layer / 1e3:,.1f} KB a layer and token" in told, told
    assert f"{(48 * layer + 4 * 896 + 2 * 151936) / 1e3:,.1f} KB a token in all, 98 gathers a step" in told, (
        told
    )
    assert "10 GbE" in slow and "Thunderbolt 5" in fast and "ms a step of 4" in fast


def test_json_is_one_line(call: Call) -> None:
    _, out, _ = call("--json", "--memory", "1GB", "--context", "100")
    (line,) = out.splitlines()
    row = json.loads(line)
    assert row["fits"] and row["available"] == 10**9 and row["context"] == 100
    assert row["training"]["moments"] == training_bytes(find_config("demo"), 100).moments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen2-15b"], "Did you mean"),
        (["--model", "nobody/nothing"], "is not on disk"),
        (["--context", "0"], "context is 0, but for demo must be from 1 to 1,024"),
        (["--batch", "-1"], "batch is -1"),
        (["--quantize", "5"], "expected 4 or 8 bits"),
        (["--memory", "much"], "is no amount of memory"),
    ],
)
def test_what_cannot_be_planned_is_one_line(call: Call, arguments: list[str], said: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2 and len(err.splitlines()) == 1 and said in err


def test_the_verdict_says_what_is_missing() -> None:
    plan = plan_memory("qwen2-7b", available=4 * 10**9, quantize=4)
    lines = verdict(plan)
    assert "too little" in lines[0] and "At most nothing" in lines[0]
    assert "does not fit" in lines[1] and "<svg" in as_svg(plan)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [size(n) for n in (2048, 12_800, 5_400_000, 2_500_000_000)] == [
        "2 KiB",
        "12.5 KiB",
        "5 MB",
        "2.50 GB",
    ]
