"""A model whose layers see their last tokens: the same tokens whatever the traffic, in a pool of these."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from tiny_llm import LLM, Completion, SamplingParams
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.errors import CapacityError
from tiny_llm.scheduler.settings import SchedulerSettings

WINDOW = 40
LONG = [5 + i * 7 % 900 for i in range(330)]
PROMPTS = [LONG[: 330 - 60 * (i % 3)] + [i + 1] * (1 + 9 * i) for i in range(6)] + [[3, 4, 5]]
PARAMS = [
    SamplingParams(
        max_tokens=20 + 30 * (i % 2), temperature=i % 2 * 1.0, seed=i, ignore_eos=True, n=1 + 2 * (i == 2)
    )
    for i in range(len(PROMPTS))
]


def with_windows(demo: Path, folder: Path, kinds: str) -> Path:
    """The bundled model with a window in the layers that are "s" of ``kinds``, again and again."""
    shutil.copytree(demo, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"s": "sliding_attention", "f": "full_attention"}
    layers = [names[kinds[i % len(kinds)]] for i in range(config["num_hidden_layers"])]
    config |= {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[("s", "auto"), ("s", "int8"), ("ssf", "auto")], ids="-".join)
def llm(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """All layers with a window, in both formats of pages; and all but each third."""
    kinds, kept = request.param
    return LLM(with_windows(demo, tmp_path_factory.mktemp(kinds) / "demo", kinds), kv_dtype=kept)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """Each request alone, its prompt in one piece, nothing remembered."""
    settings = EngineSettings(kv_blocks=512, prefix_cache=False, async_scheduling=False, speculate="off")
    return [
        told
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        for told in ids(llm.with_engine(settings).generate([prompt], params))
    ]


def ids(answers: list[Completion]) -> list[list[int]]:
    return [one.token_ids for one in answers]


def swapping(preemption: str, host: int = 0) -> EngineSettings:
    limits = SchedulerSettings(max_num_batched_tokens=30, max_num_seqs=6, max_step_ms=inf)  # no clock decides
    chunks = replace(limits, preemption=preemption)
    return EngineSettings(kv_blocks=56, host_blocks=host, scheduler=chunks)


SETTINGS = {
    "roomy": EngineSettings(kv_blocks=512),
    "blocks of 64": EngineSettings(kv_blocks=128, block_size=64),
    "no guesses": EngineSettings(kv_blocks=512, speculate="off"),
    "small chunks": EngineSettings(
        kv_blocks=512, scheduler=SchedulerSettings(max_num_batched_tokens=13, max_num_seqs=8)
    ),
    "recompute": swapping("recompute"),
    "swap": swapping("swap", host=256),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_traffic_changes_no_token(llm: LLM, name: str, expected: list[list[int]]) -> None:
    settings = SETTINGS[name]
    if settings.kv_blocks == 56 and all(llm.config.windows):
        settings = replace(settings, kv_blocks=14)  # which is as scarce
    own = llm.with_engine(settings)
    scheduler = own.engine.scheduler
    for again in range(2):  # the second time, what is left of the first is found
        assert ids(own.generate(PROMPTS, PARAMS)) == expected, "again" if again else "at first"
        scheduler.check_integrity()
    assert scheduler.blocks.prefix is not None
    assert scheduler.blocks.prefix.hit_tokens > 100
    if settings.kv_blocks == 14:
        assert scheduler.preempted[name] > 0, "the pool is too large to show anything"


@pytest.mark.slow
def test_the_window_counts(llm: LLM, demo: Path, expected: list[list[int]]) -> None:
    """Else the tests above show nothing."""
    whole = LLM(demo).with_engine(EngineSettings(kv_blocks=512))
    differ = [a != b for a, b in zip(ids(whole.generate(PROMPTS, PARAMS)), expected, strict=True)]
    assert sum(differ) > 4


def test_a_sequence_holds_its_window_and_a_step(demo: Path, tmp_path: Path) -> None:
    """900 tokens go through a pool of 160; without windows in all layers they are refused."""
    chunks = SchedulerSettings(max_num_batched_tokens=64, max_num_seqs=4)
    settings = EngineSettings(kv_blocks=10, scheduler=chunks)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    prompt = [5 + i * 11 % 900 for i in range(840)]
    llm = LLM(with_windows(demo, tmp_path / "all", "s"))
    roomy = llm.with_engine(EngineSettings(kv_blocks=512, prefix_cache=False, speculate="off"))
    small = llm.with_engine(settings)
    engine = small.engine
    number, most, tokens = engine.add(prompt, params), 0, list[int]()
    while len(engine):
        tokens += [token for key, chunk in engine.step() if key == number for token in chunk.token_ids]
        most = max(most, engine.scheduler.usage().used)
    assert tokens == roomy.generate([prompt], params)[0].token_ids
    assert most <= -(-(WINDOW + 64) // 16) + 1 < len(prompt) // 16, f"{most} blocks are held at a time"
    with pytest.raises(CapacityError):
        LLM(with_windows(demo, tmp_path / "some", "sf")).with_engine(settings).generate([prompt], params)
