"""What a simulation must keep, whatever comes: every request once, blocks conserved, the same again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tiny_llm.cli import main
from tiny_llm.planning.simulation.cluster import Cluster, Simulated
from tiny_llm.planning.simulation.contiguous import ContiguousBlocks
from tiny_llm.planning.simulation.costs import StepMs, costs_of
from tiny_llm.planning.simulation.figures import ServedWell, Sketch
from tiny_llm.planning.simulation.load import Load
from tiny_llm.planning.simulation.policy import Policy

COSTS = StepMs("a test's", (1, 2048), (5.0, 200.0), 0.01, 1e-4, 1e-5, 1000, 4096)
LOAD = Load(requests=60, rate=40.0, lengths="60:30", longest=512)
TIGHT = Policy(kv_tokens=600, max_model_len=512, max_concurrent=32)


def cluster(policy: Policy, *, strides: bool = True) -> Cluster:
    return Cluster(policy, COSTS, ServedWell(), strides=strides)


def served(policy: Policy, load: Load = LOAD, *, strides: bool = True) -> Simulated:
    """The outcome, with all accounts checked at the end."""
    made = cluster(policy, strides=strides)
    outcome = made.run(load)
    for engine in [*made.readers, *made.engines]:
        assert not len(engine) and not engine.scheduler.tables(), "somebody is left"
        engine.scheduler.check_integrity()
    return outcome


PAGED = st.fixed_dictionaries({"prefill": st.integers(0, 1)})
RUNS = st.fixed_dictionaries({"memory": st.sampled_from(("first", "best", "buddy"))})
OTHERS = st.fixed_dictionaries(
    {
        "reserve": st.sampled_from(("exact", "pow2", "max")),
        "max_model_len": st.just(512),
        "kv_tokens": st.sampled_from((1024, 4096)),
        "block_size": st.sampled_from((8, 16, 128)),
        "prefix_cache": st.sampled_from(("off", "on", "disk")),
        "preemption": st.sampled_from(("recompute", "swap", "auto")),
        "max_concurrent": st.sampled_from((4, 64)),
        "chunk_budget": st.sampled_from((64, 2048)),
        "order": st.sampled_from(("fcfs", "priority", "shortest")),
        "acceptance": st.sampled_from((0.0, 0.7)),
        "replicas": st.integers(1, 3),
        "routing": st.sampled_from(("round-robin", "random", "prefix")),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(OTHERS, PAGED | RUNS, st.sampled_from((0, 100)), st.sampled_from(("poisson", "bursts")))
def test_every_request_is_served_once_and_nothing_is_lost(
    others: dict[str, Any], memory: dict[str, Any], shared: int, source: str
) -> None:
    load = replace(LOAD, requests=25, shared=shared, groups=3, source=source, urgent=0.2)
    outcome = served(Policy(**others, **memory), load)
    asked = list(load)
    assert outcome.row["requests"] == len(asked) and outcome.row["refused"] == 0
    assert outcome.row["tok_s"] * outcome.row["seconds"] == pytest.approx(sum(one.answer for one in asked))


@pytest.mark.parametrize(
    "policy", [TIGHT, replace(TIGHT, preemption="swap"), replace(TIGHT, prefix_cache="off")]
)
def test_a_stretch_of_steps_is_what_its_single_steps_are(policy: Policy) -> None:
    fast, slow = served(policy).row, served(policy, strides=False).row
    assert fast["preempted"] > 0, "nobody had to make room: the test says nothing"
    of_users = [name for name in fast if not name.endswith("share") and name != "held_of_used"]
    assert {name: fast[name] for name in of_users} == pytest.approx({name: slow[name] for name in of_users})


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    assert served(TIGHT).row == served(TIGHT).row
    assert served(TIGHT).row != served(TIGHT, replace(LOAD, seed=1)).row


@pytest.mark.parametrize("size", [8, 16, 128])
def test_pages_waste_less_than_a_block_a_sequence(size: int) -> None:
    samples = served(Policy(kv_tokens=2048, block_size=size), replace(LOAD, rate=200.0)).samples
    assert max(one.running for one in samples) > 5
    assert all(one.wasted + one.to_come < max(1, one.running) * size for one in samples)


def test_pages_hold_more_tokens_than_runs_do() -> None:
    """In kind what Kwon et al. 2023 say in figure 2: 96.3 % of the memory, against 20.4 to 38.2 %."""
    tight = Policy(kv_tokens=2000, max_model_len=512)
    rows = {
        memory: served(replace(tight, memory=memory, reserve=reserve), replace(LOAD, rate=1000.0)).row
        for memory, reserve in (("paged", "max"), ("buddy", "exact"), ("first", "max"))
    }
    held = {memory: row["held_of_used"] for memory, row in rows.items()}
    assert held["paged"] > 0.9 > 0.6 > held["buddy"] > held["first"]
    assert rows["paged"]["tok_s"] > rows["buddy"]["tok_s"] > rows["first"]["tok_s"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(("first", "best", "buddy")),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9)), max_size=60),
)
def test_runs_never_overlap(fit: str, asked: list[tuple[int, int, int]]) -> None:
    blocks = ContiguousBlocks(300, fit, "exact", 100)
    tables = []
    for prompt, answer, leaving in asked:
        table = blocks.table(f"{prompt} {answer}")
        fits = blocks.would_fit(table, ())
        assert (blocks.allocate(table, ()) is not None) == fits
        tables.append(table)
        blocks.check_integrity(tables)
        if leaving < len(tables):
            blocks.free(tables.pop(leaving))
            blocks.check_integrity(tables)
    for table in tables:
        blocks.free(table)
    assert blocks.available == 300 and len(blocks._holes) == 1, "holes side by side are one"


def test_a_sketch_s_quantiles_are_near_the_true_ones() -> None:
    sketch, numbers = Sketch(), [1.07**n for n in range(200)]
    for number in numbers:
        sketch.add(number)
    for share in (0.01, 0.5, 0.95, 1.0):
        assert sketch.quantile(share) == pytest.approx(numbers[int(share * 200) - 1], rel=0.01)
    assert Sketch().quantile(0.5) == 0


def test_a_bigger_device_is_faster_and_a_step_never_gets_cheaper() -> None:
    small, large = costs_of("qwen2-7b", "l4"), costs_of("qwen2-7b", "h100")
    assert large.kv_tokens > small.kv_tokens
    for rows in (1, 3, 100, 5000):
        assert large.ms(rows, 1, 0, 0) < small.ms(rows, 1, 0, 0) <= small.ms(rows + 1, 1, 10, 10)


def test_the_command_loads_no_mlx_and_draws(tmp_path: Path) -> None:
    code = (
        "import sys; from tiny_llm.cli import main; code = main(sys.argv[1:]);"
        "assert not any(name.split('.')[0] == 'mlx' for name in sys.modules), 'MLX'; sys.exit(code)"
    )
    asked = ["--requests", "30", "--json", "--vary", "block-size=8,16", "--svg", str(tmp_path)]
    command = [sys.executable, "-c", code, "simulate", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.split("\n") if line]
    assert [row["policy"] for row in rows] == ["block-size=8", "block-size=16"]
    assert all(row["requests"] == 30 for row in rows)
    pictures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert (
        len(pictures) == 6
        and "block-size-8-pool.svg" in pictures
        and "block-size-16-timeline.svg" in pictures
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--load", "posson"], "Did you mean 'poisson'"),
        (["--lengths", "long"], "sharegpt, alpaca"),
        (["--vary", "blocksize=8"], "Did you mean 'block-size'"),
        (["--vary", "memory=pages"], "should be 'paged', 'first', 'best' or 'buddy'"),
        (["--vary", "block-size=x"], "should be a valid integer"),
        (["--device", "h10"], "Did you mean 'h100'"),
        (["--model", "qwen2.5-72b"], "does not fit"),
        (["--block-size", "0"], "block_size is 0"),
    ],
)
def test_what_cannot_be_is_said(asked: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--requests", "1", *asked]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
