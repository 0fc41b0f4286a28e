"""The trial on metalsim, with faults planted in the kernels' text: each is caught, and the others go on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.proving import trial
from tiny_llm.proving.cases import ops_of
from tiny_llm.proving.child import KernelJob
from tiny_llm.proving.record import Proof, Record, Shapes
from tiny_llm.proving.trial import Limits, kernels_for, proved, tried

pytestmark = pytest.mark.slow
Plant = Callable[[str, str, str], None]
LONG = Limits(120.0, 600.0)
HANG = "for (volatile int i = 0; i >= 0; i = 0) {}"


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LLM_METALSIM", "fast")


def wrong(shapes: Shapes, *ops: str, limits: Limits = LONG) -> dict[str, str]:
    """What is wrong with each op that got a proof."""
    return {proof.op: proof.wrong for proof in tried(KernelJob("metalsim", shapes, ops, True), limits)}


def test_kernels_as_they_are_prove_right_and_are_timed(shapes: Shapes) -> None:
    said: list[tuple[float, str]] = []
    job = KernelJob("metalsim", shapes, ops_of(shapes), True)
    proofs = list(tried(job, LONG, lambda part, what: said.append((part, what))))
    assert {proof.op: proof.wrong for proof in proofs} == dict.fromkeys(ops_of(shapes), "")
    for proof in proofs:
        assert proof.timings and all(one.ours_us > 0 and one.mlx_us > 0 for one in proof.timings), proof
    assert [part for part, _ in said] == sorted(part for part, _ in said)
    assert ("rope: a rotation") in [what for _, what in said]


def test_half_precision_proves_right(shapes: Shapes) -> None:
    half = replace(shapes, dtype="bfloat16", bits=8, more="4/64")
    assert wrong(half, *ops_of(half)) == dict.fromkeys(ops_of(half), "")


def test_what_is_wrong_is_caught_and_the_others_go_on(shapes: Shapes, plant: Plant) -> None:
    """A wrong value, a text that does not compile, a process that ends by a signal."""
    plant("rms_norm", "add_rms_norm", "#define eps 0.5f")
    plant("swiglu", "swiglu", "this is no statement;")
    plant("sample", "sample", "__builtin_trap();")
    found = wrong(shapes, "sample", "rms_norm", "swiglu", "rope")
    assert list(found) == ["sample", "rms_norm", "swiglu", "rope"]
    assert re.fullmatch(r"a token by each option: .* was ended by SIG(ILL|TRAP)", found["sample"])
    assert re.fullmatch(r"a sum and its norm: off by .* allowed 2e-05", found["rms_norm"])
    assert re.fullmatch(r"a gated unit: CompileError: .*", found["swiglu"])
    assert found["rope"] == ""


def test_a_row_that_does_not_keep_its_bits_is_wrong(shapes: Shapes, plant: Plant) -> None:
    plant("rms_norm", "add_rms_norm", "#define eps (rows > 1 ? 1e-6f : 1e-4f)")
    assert wrong(shapes, "rms_norm") == {"rms_norm": "a row alone and among others: other bits"}


def test_a_kernel_that_hangs_is_left_behind(shapes: Shapes, plant: Plant) -> None:
    assert wrong(shapes, "swiglu") == {"swiglu": ""}, "and it is compiled by now"
    plant("rope", "rope_qk", HANG)
    found = wrong(shapes, "rope", "swiglu", limits=Limits(10.0, 600.0))
    assert found == {"rope": "a rotation: no answer within 10 s", "swiglu": ""}


def test_a_child_whose_parent_is_gone_ends_all_the_same(shapes: Shapes, plant: Plant) -> None:
    """One that hung in a kernel ran for ever."""
    plant("rope", "rope_qk", HANG)
    job = replace(KernelJob("metalsim", shapes, ("rope",), True), seconds=4.0)
    command = [sys.executable, "-m", "tiny_llm.proving.child"]
    done = subprocess.run(command, input=msgspec.json.encode(job), capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGALRM, done.stderr


def test_the_time_for_all_is_kept(shapes: Shapes, plant: Plant) -> None:
    """Else the hang would end by metalsim's own limit, and be a proof."""
    assert wrong(shapes, "swiglu") == {"swiglu": ""}, "and it is compiled by now"
    plant("rope", "rope_qk", HANG)
    in_time = Limits(600.0, 8.0)
    assert wrong(shapes, "swiglu", "rope", limits=in_time) == {"swiglu": ""}, "rope may be tried again"
    found = wrong(shapes, "rope", "swiglu", limits=in_time)
    assert found == {"rope": "a rotation: not done within 8 s"}, "it would be the same at the next start"
    made = proved("metalsim", shapes, Limits(600.0, 0.0))
    assert set(made) == set(ops_of(shapes))
    assert all(proof.wrong.startswith("not tried within") for proof in made.values())
    assert Record.of("metalsim", shapes).read() == {}, "the next start tries them"


def test_a_child_that_does_not_start_says_nothing_of_kernels(
    shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.sys, "executable", "/bin/false")
    assert wrong(shapes, *ops_of(shapes)) == {}


def test_modules_of_the_folder_that_we_are_called_in_are_not_taken(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert wrong(shapes, "swiglu") == {"swiglu": ""}


def test_an_interpreter_that_is_not_there_keeps_nothing_from_starting(
    shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.sys, "executable", "/nowhere/python")
    kernels = kernels_for("metalsim", shapes, "auto")
    assert kernels.ours == frozenset() and not kernels.same_tokens


def test_what_is_known_is_not_tried_again_and_another_text_is(
    shapes: Shapes, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def counted(job: KernelJob, *_: object) -> Iterator[Proof]:
        asked.append(job.ops)
        yield from (Proof(op) for op in job.ops)

    monkeypatch.setattr(trial, "tried", counted)
    kernels_for("metalsim", shapes, "ours")
    kernels_for("metalsim", shapes, "auto")
    assert asked == [ops_of(shapes)]
    Record.of("metalsim", shapes).path.write_text("{")
    kernels_for("metalsim", shapes, "auto")
    assert len(asked) == 2, "a file that cannot be read is as none"
    plant("rope", "rope_qk", "// another text")
    kernels_for("metalsim", shapes, "auto")
    assert len(asked) == 3, "another text of the kernels"
    kernels_for("metalsim", replace(shapes, hidden=128), "auto")
    assert len(asked) == 4, "another model"


def test_two_processes_try_at_once(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ops_of", lambda _: ("swiglu",))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: proved("metalsim", shapes, LONG), range(2))
    assert one["swiglu"].wrong == other["swiglu"].wrong == ""
    kept = Record.of("metalsim", shapes)
    assert kept.read() in (one, other)
    assert list(kept.path.parent.iterdir()) == [kept.path], "no temporary file stays"
