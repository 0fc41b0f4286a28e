"""Memory to swap to, as an operator gives it: by the library, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_llm import LLM, SamplingParams, cli
from tiny_llm.commands.loading import arguments
from tiny_llm.engine import llm as front
from tiny_llm.engine.engine import Engine
from tiny_llm.errors import ConfigError
from tiny_llm.options import EngineOptions
from tiny_llm.scheduler.settings import SchedulerSettings

BLOCK_BYTES = 20480  # of stories260K in float32


def test_an_llm_swaps_to_what_it_is_given(stories260k: Path) -> None:
    swap = SchedulerSettings(preemption="swap")
    tight = LLM(
        stories260k,
        dtype="float32",
        kv_memory=24 * BLOCK_BYTES,
        swap_memory=64 * BLOCK_BYTES + 1,
        scheduler=swap,
    )
    assert tight.engine.cache.format.block_bytes == BLOCK_BYTES
    assert (tight.engine.settings.kv_blocks, tight.engine.settings.host_blocks) == (24, 64)
    assert tight.memory.endswith(", 384 tokens · 0.00 GB to swap to")
    prompts, params = [[1, 400 + i] for i in range(6)], SamplingParams(max_tokens=120, ignore_eos=True)
    expected = LLM(stories260k, dtype="float32").generate(prompts, params)
    found = tight.generate(prompts, params)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert tight.engine.scheduler.preempted["swap"] > 0


def test_the_command_line_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Engine] = []

    class Kept(Engine):
        def __init__(self, *given: object, **options: object) -> None:
            super().__init__(*given, **options)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(front, "Engine", Kept)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Hi", "max_tokens": 2}))
    memory = ["--kv-memory", "2MB", "--swap-memory", "4MB"]
    assert cli.main(["generate", "--file", str(tmp_path / "prompts.jsonl"), *memory]) == 0
    (engine,) = made
    assert engine.settings.host_blocks == 4_000_000 // engine.cache.format.block_bytes > 0
    assert arguments(EngineOptions(swap_memory="2GB"))["swap_memory"] == 2 * 10**9
    assert cli.main(["generate", "-p", "Hi", "--kv-memory", "2MB", "--swap-memory", "100TB"]) == 2
    told = capsys.readouterr().err
    assert "kv_memory and swap_memory are 100,000,002,000,000 bytes, but" in told, told


def test_less_than_a_block_is_no_memory_to_swap_to() -> None:
    with pytest.raises(ConfigError, match="swap_memory is 5 bytes, but one block of 16 tokens takes"):
        LLM("demo", swap_memory=5)
