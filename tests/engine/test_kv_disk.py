"""A prefix cache that survives a restart: the same answers, sooner."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.engine.test_same_tokens import SETTINGS, alone, together, traffic
from tiny_llm import LLM, SamplingParams
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import ConfigError
from tiny_llm.kv.disk import DiskUsage
from tiny_llm.server.prometheus import exposition

PARAMS = SamplingParams(max_tokens=8, temperature=0)
PROMPT = list(range(5, 105))
BLOCKS = len(PROMPT) // 16


def usage(llm: LLM) -> DiskUsage:
    found = llm.engine.stats().disk
    assert found is not None
    return found


@pytest.mark.parametrize("kept", ["auto", "int8"])
def test_a_prompt_is_found_again_after_a_restart(demo: Path, tmp_path: Path, backend: str, kept: str) -> None:
    with LLM(demo, backend=backend, kv_dtype=kept, kv_disk=tmp_path) as first:
        (expected,) = first.generate([PROMPT], PARAMS)
        assert expected.cached_tokens == 0 and usage(first).blocks == 0, "it is all in the pool still"
    with LLM(demo, backend=backend, kv_dtype=kept, kv_disk=tmp_path) as second:
        assert usage(second).blocks == (len(PROMPT) + 7) // 16
        (found,) = second.generate([PROMPT], PARAMS)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.cached_tokens == BLOCKS * 16 and usage(second).read == BLOCKS
        (again,) = second.generate([PROMPT], PARAMS)
        assert again.token_ids == expected.token_ids and usage(second).read == BLOCKS, "now it is in the pool"
    assert usage_after(demo, tmp_path, backend=backend, kv_dtype=kept).written == 0, "nothing was new"


def usage_after(model: Path, folder: Path, **options: str) -> DiskUsage:
    """Of an engine that has just started."""
    with LLM(model, kv_disk=folder, **options) as llm:  # type: ignore[arg-type]
        return usage(llm)


def test_what_was_computed_otherwise_is_not_taken(demo: Path, demo_copy: Path, tmp_path: Path) -> None:
    """Other weights under the same name, another precision, another backend or format: each has its own."""
    with LLM(demo_copy, kv_disk=tmp_path) as first:
        first.generate([PROMPT], PARAMS)
    weights = demo_copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    kept = [{"kv_dtype": name} for name in ("int8", "float16")]  # this model's are bfloat16
    for options in ({}, {"activations": "exact"}, {"backend": "ref"}, *kept):
        if not options:
            changed[-1] ^= 1
            weights.write_bytes(changed)
        with LLM(demo_copy, kv_disk=tmp_path, **options) as other:  # type: ignore[arg-type]
            assert other.generate([PROMPT], PARAMS)[0].cached_tokens == 0, options
        changed[-1] ^= not options
        weights.write_bytes(changed)
    with LLM(demo_copy, kv_disk=tmp_path) as last:
        assert last.generate([PROMPT], PARAMS)[0].cached_tokens == BLOCKS * 16


def test_what_leaves_a_full_pool_comes_back_from_disk(demo: Path, tmp_path: Path) -> None:
    prompts = [[i, *PROMPT] for i in range(5, 13)]
    with LLM(demo, kv_disk=tmp_path) as llm:
        small = llm.with_engine(EngineSettings(kv_blocks=10))
        expected = [small.generate([prompt], PARAMS)[0] for prompt in prompts]
        found = [small.generate([prompt], PARAMS)[0] for prompt in prompts]
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert all(one.cached_tokens == BLOCKS * 16 for one in found)
        assert usage(small).written >= 8 * BLOCKS - 10


def test_a_damaged_file_is_computed_anew(demo: Path, tmp_path: Path) -> None:
    with LLM(demo, kv_disk=tmp_path) as first:
        (expected,) = first.generate([PROMPT], PARAMS)
    for path in tmp_path.glob("*/*.kv"):
        path.write_bytes(path.read_bytes()[:-1])
    with LLM(demo, kv_disk=tmp_path) as second:
        (found,) = second.generate([PROMPT], PARAMS)
        assert found.token_ids == expected.token_ids and found.cached_tokens == 0
        assert usage(second).damaged == 1, "behind it nothing was asked for"


def test_what_is_not_to_be_kept_is_not(demo: Path, tmp_path: Path) -> None:
    with LLM(demo, kv_disk=tmp_path) as llm:
        llm.engine.add(PROMPT, PARAMS, keep=False)
        while len(llm.engine):
            llm.engine.step()
        llm.generate([PROMPT[:40]], PARAMS)  # the same beginning, of somebody who does not mind: two blocks
        scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
        llm.generate([PROMPT[::-1]], scored)  # found again, it would have no logits
    assert usage_after(demo, tmp_path).blocks == 2


def test_usage_says_what_is_cached_and_what_is_on_disk(demo: Path, tmp_path: Path) -> None:
    with LLM(demo, kv_disk=tmp_path) as llm:
        llm.generate([PROMPT], PARAMS)
        cached = llm.engine.stats().blocks.cached
        assert cached == BLOCKS + 1 and "tiny_llm_kv_disk_kept_blocks" in (told := metrics(llm))
        assert f'kv_cache_cached_blocks{{model_name="m"}} {float(cached)}' in told
        llm.engine.rest()
        while usage(llm).blocks < BLOCKS:
            time.sleep(0.001)
        told = metrics(llm)
        assert 'kv_cache_cached_blocks{model_name="m"} 0.0' in told
        assert f'kv_disk_kept_blocks{{model_name="m"}} {float(BLOCKS)}' in told
        assert f'kv_disk_bytes{{model_name="m"}} {float(usage(llm).bytes)}' in told


def metrics(llm: LLM) -> str:
    return exposition(llm.engine.stats(), "m", 0).decode()


def test_keys_share_nothing_on_disk_either(demo: Path, tmp_path: Path) -> None:
    for salt, cached in (("one", 0), ("two", 0), ("one", BLOCKS * 16)):
        with LLM(demo, kv_disk=tmp_path) as llm:
            llm.engine.add(PROMPT, PARAMS, salt=salt)
            while len(llm.engine):
                events = llm.engine.step()
            assert events[-1].chunk.completion is not None
            assert events[-1].chunk.completion.cached_tokens == cached, salt


def test_a_rest_keeps_what_was_cached(demo: Path, tmp_path: Path) -> None:
    with LLM(demo, kv_disk=tmp_path) as llm:
        expected = llm.generate([PROMPT], PARAMS)[0].token_ids
        llm.engine.rest()
        (found,) = llm.generate([PROMPT], PARAMS)
        assert (found.token_ids, found.cached_tokens) == (expected, BLOCKS * 16)


def test_a_size_that_holds_nothing_is_refused(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_disk_size \(--kv-disk-size\) is 0"):
        LLM(demo, kv_disk=tmp_path, kv_disk_size=0)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("name", ["recompute", "swap", "a draft model, recompute"])
def test_the_disk_changes_no_token(demo: Path, tmp_path: Path, name: str, kept: str) -> None:
    """Twice: blocks that leave a pool that is too small come back in the same run, and in the next."""
    with LLM(demo, draft="demo-draft", kv_dtype=kept) as plain:
        asks = traffic(plain, 21, 12)
        expected = alone(plain, asks)
    for _ in range(2):
        with LLM(demo, draft="demo-draft", kv_dtype=kept, kv_disk=tmp_path) as llm:
            own = llm.with_engine(SETTINGS[name])
            assert together(own, SETTINGS[name], asks) == expected
            own.engine.keep_cached()
    assert usage_after(demo, tmp_path, kv_dtype=kept).blocks > 5
