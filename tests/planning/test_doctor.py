"""main.py doctor: backends, and what was found of our kernels as it was stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_llm.cli import app
from tiny_llm.metalsim.build import why_not
from tiny_llm.models import registry
from tiny_llm.ops.backend import BACKENDS, works
from tiny_llm.planning.doctor import OPS, fallen_back, ops_of
from tiny_llm.proving.choice import OPS as KERNELS
from tiny_llm.proving.record import KernelTiming, Proof, Record, Shapes

SHAPES = Shapes(896, 14, 2, 64, 4864, 151936, 4, 64, "bfloat16", 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_llm.proving.record.user_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "150")


def doctor(*arguments: str) -> list[str]:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 0, done.output
    return [line.strip() for line in done.output.splitlines()]


def test_each_backend_is_there_or_why_not() -> None:
    lines = doctor()
    first = lines.index("backends") + 1
    assert [line.split()[0] for line in lines[first : first + len(BACKENDS)]] == list(BACKENDS)
    assert lines[first].startswith("ref       there")
    assert lines[-1] == "kernels   none of ours was tried on a GPU here; the first start on one does it"


def test_what_was_found_is_a_table_with_a_row_for_each_shape() -> None:
    fast, slow = KernelTiming("1 row", 20.0, 30.0), KernelTiming("512 rows", 1000.0, 500.0)
    proofs = [
        Proof("rope", "", (fast,)),
        Proof("swiglu", "", (fast, slow)),
        Proof("sample", "a token by each option: another token"),
    ]
    Record.of("metal", SHAPES).add(proofs)
    lines = doctor()
    assert cells(lines) == [
        ["rope", "1 row", "20.0", "30.0", "1.50x", "yes", "ours", "1.50x MLX's speed at 1 row"],
        ["sample", "", "", "", "", "no", "MLX's", "a token by each option: another token"],
        ["swiglu", "1 row", "20.0", "30.0", "1.50x", "yes", "MLX's", "0.50x MLX's speed at 512 rows"],
        ["", "512 rows", "1,000.0", "500.0", "0.50x", "", "", ""],
    ]
    assert any("4 bits in groups of 64, bfloat16" in line for line in lines)
    assert any("tokens may depend on what else is running" in line.lower() for line in lines)


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_a_models_shapes_and_their_kernels() -> None:
    rows = cells(doctor("--model", "qwen2-0.5b", "--quantize", "4", "--backend", "ref"))
    assert rows == [[op, "plain MLX"] for op in OPS]


@pytest.mark.skipif(not works(), reason="there are no CPU kernels")
def test_what_has_no_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cells(doctor("--model", "qwen2-0.5b", "--quantize", "8", "--backend", "cpu"))
    assert whole == [[op, "our C++ kernel"] for op in OPS]
    # As for an architecture that gives its matrices to others than layers.
    decoder_of = registry.decoder_of
    monkeypatch.setattr(registry, "decoder_of", lambda family: replace(decoder_of(family), packed=False))
    rows = dict(cells(doctor("--model", "qwen2-0.5b", "--quantize", "8", "--backend", "cpu")))
    assert rows["linear"] == "plain MLX: no kernel for these arrays"
    assert rows["paged_attention"] == "our C++ kernel"


@pytest.mark.slow
def test_kernels_for_gpus_are_tried_on_the_models_shapes() -> None:
    if reason := why_not():
        pytest.skip(reason)
    lines = doctor("--model", "demo", "--quantize", "4", "--backend", "metalsim")
    rows = [row for row in cells(lines) if row[0]]
    assert [row[0] for row in rows] == [op for op in KERNELS if op != "experts"]
    assert {row[5] for row in rows} == {"yes"}, lines
    assert any("hidden 256, heads 4/2 x 64" in line for line in lines)


@pytest.mark.skipif(not works(), reason="there are no CPU kernels")
def test_ops_are_those_that_the_model_has() -> None:
    """GPT-2 has no RoPE, and what it has for RMSNorm is plain MLX everywhere."""
    rows = dict(cells(doctor("--model", "gpt2", "--quantize", "8", "--backend", "cpu")))
    assert {op for op, runs in rows.items() if runs.startswith("plain MLX")} == {"layer_norm"}
    assert not rows.keys() & {"rope", "rms_norm", "swiglu"} and rows["gelu"] == "our C++ kernel"


@pytest.mark.skipif(not works(), reason="there are no CPU kernels")
def test_experts_are_an_op_though_the_first_layer_has_none(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = registry.load_config(golden / "qwen3_moe")
    assert config.experts is not None and config.experts.layers == {1}
    assert ops_of(config) == [*OPS, "experts"] and "experts" not in ops_of(
        registry.load_config(golden / "llama")
    )
    how = {"dtype": None, "quantize": None}
    assert not fallen_back(config, "cpu", **how).get("experts")
    decoder_of = registry.decoder_of
    monkeypatch.setattr(registry, "decoder_of", lambda family: replace(decoder_of(family), packed=False))
    assert fallen_back(config, "cpu", **how)["experts"], "they were not run"
