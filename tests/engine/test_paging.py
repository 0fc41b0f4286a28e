"""Pages change nothing: neither the tokens, nor what the model remembers, nor how much memory there is."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from demo_score import held_out_examples

from tiny_llm import LLM, Completion, SamplingParams
from tiny_llm.decoding.generate import generate, generate_without_cache
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.kv.dense import DenseCache
from tiny_llm.ops.backend import use
from tiny_llm.scheduler.settings import SchedulerSettings

SAMPLED = SamplingParams(max_tokens=60, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)
RECALLED = 12


def without_pages(llm: LLM, prompt: list[int], params: SamplingParams, *, cache: bool) -> list[int]:
    """The same tokens from the plain loop, one sequence and no engine."""
    with use(llm.backend):
        if cache:
            kept = DenseCache(llm.config.num_layers, llm.engine.cache.format.dtype)
            tokens = generate(llm._model, kept, prompt, params)
        else:
            tokens = generate_without_cache(llm._model, prompt, params)
        return [token.id for token in islice(tokens, params.max_tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("params", [replace(SAMPLED, temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_pages_change_no_token_of_a_real_llama(
    stories260k: Path, params: SamplingParams, backend: str
) -> None:
    llm = LLM(stories260k, dtype="float32", backend=backend)
    (paged,) = llm.generate([1], params)
    assert paged.token_ids == without_pages(llm, [1], params, cache=True)
    assert paged.token_ids == without_pages(llm, [1], params, cache=False)


@pytest.mark.parametrize("params", [replace(SAMPLED, temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_pages_change_no_token_of_the_bundled_model(llm: LLM, params: SamplingParams) -> None:
    prompt = llm.chat_prompt([{"role": "user", "content": "Tell me a story about a fox."}])
    (paged,) = llm.generate(prompt, params)
    assert paged.token_ids == without_pages(llm, prompt, params, cache=True)


def asked(llm: LLM, settings: EngineSettings, times: int = 1) -> tuple[LLM, list[Completion]]:
    """Facts told and asked for, all at once, through an engine of its own; the last time counts."""
    own = llm.with_engine(settings)
    prompts = [own.chat_prompt(e.messages[:-1]) for e in held_out_examples("recall", RECALLED)]
    for _ in range(times):
        done = own.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    return own, done


def right(answers: list[Completion]) -> int:
    examples = held_out_examples("recall", RECALLED)
    told = [str(example.messages[-1]["content"]) for example in examples]
    return sum(a.text.startswith(fact) for a, fact in zip(answers, told, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["recompute", "swap"])
def test_facts_are_remembered_through_preemption(llm: LLM, policy: str) -> None:
    scheduler = SchedulerSettings(preemption=policy)
    own, answers = asked(llm, EngineSettings(kv_blocks=36, host_blocks=80, scheduler=scheduler))
    assert own.engine.scheduler.preempted[policy] > 0, "the pool is too large to show anything"
    assert right(answers) == right(asked(llm, EngineSettings(kv_blocks=2048))[1]) == RECALLED


@pytest.mark.slow
def test_facts_are_remembered_through_prefix_hits(llm: LLM) -> None:
    _, answers = asked(llm, EngineSettings(kv_blocks=2048), times=2)
    assert all(answer.cached_tokens >= len(answer.prompt_token_ids) - 16 for answer in answers)
    assert right(answers) == RECALLED


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_resident_memory_is_flat_over_2000_steps_and_rests(llm: LLM) -> None:
    """Requests come and go, and pools with every rest; what they leave behind is nothing.

    Asked at rest, as the allocator's caches grow in leaps. Pools once lay between weights, and stayed.
    """
    engine = llm.with_engine(EngineSettings(kv_blocks=128, slab_blocks=16)).engine
    resident = []
    for _ in range(6):
        for step in range(400):
            while len(engine) < 4:
                engine.add(
                    [step % 1000 + 1] * 20, SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True)
                )
            engine.step()
        while len(engine):
            engine.step()
        engine.rest()
        resident.append(resident_bytes())
    grown = [after - before for before, after in pairwise(resident)]
    assert min(grown) < 250_000, f"600 bytes a step: {grown}"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_an_engine_at_rest_has_given_its_memory_back_and_answers_as_before(llm: LLM) -> None:
    own = llm.with_engine(EngineSettings(kv_blocks=512))
    prompts = [[number] * 900 for number in range(4)]
    first = own.generate(prompts, SAMPLED)
    filled, held = own.engine.cache.format.block_bytes * own.engine.scheduler.usage().cached, resident_bytes()
    assert filled > 10_000_000
    own.engine.rest()
    assert own.engine.scheduler.usage().capacity == 0
    assert held - resident_bytes() > 0.8 * filled
    again = own.generate(prompts, SAMPLED)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in first]
    assert not any(answer.cached_tokens for answer in again)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_an_engine_at_rest_keeps_nothing_of_its_largest_steps(demo: Path) -> None:
    """glibc kept what MLX had given back, in the middle of its heap: 1.75 GB after one step of a 7B."""
    steps = """
import re
from pathlib import Path
from tiny_llm import LLM, SamplingParams
def resident() -> int:
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
llm = LLM("demo")
llm.generate([[5] * 20], SamplingParams(max_tokens=2))
before = resident()
llm.generate([[i + 5] * 900 for i in range(6)], SamplingParams(max_tokens=8, ignore_eos=True))
llm.engine.rest()
print(before, resident())
"""
    child = subprocess.run([sys.executable, "-c", steps], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert after < before + 20, f"{after} MB are resident, {before} before"


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
