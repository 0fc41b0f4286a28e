"""Predictions follow from the machine's speeds; those are measured on our own operations."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tiny_llm import cli
from tiny_llm.config import Quantization
from tiny_llm.ops.backend import use, works
from tiny_llm.planning.memory import find_config
from tiny_llm.planning.speed import FORMAT, Machine, measure_machine, predict

MACHINE = Machine(bytes_s=35e9, matrix_flops_s=700e9, attention_flops_s=200e9)


@pytest.fixture
def kernels() -> Iterator[None]:
    """Ours; plain MLX would take a minute."""
    if not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    with use("cpu"):
        yield


@pytest.mark.chapter("0.3")
def test_what_binds_is_what_counts() -> None:
    config = find_config("qwen2-0.5b")
    usual = predict(config, MACHINE, quantize=FORMAT, prompt=512, answer=32)
    reads_faster = Machine(70e9, 700e9, 200e9)
    faster = predict(config, reads_faster, quantize=FORMAT, prompt=512, answer=32)
    assert faster.prefill == usual.prefill, "a prompt is bound by operations"
    assert 1.9 < faster.decode / usual.decode <= 2, "an answer is bound by reading"
    wider = predict(config, MACHINE, quantize=Quantization(8, 64), prompt=512, answer=32)
    assert 1.7 < usual.decode / wider.decode < 2, "twice the bits, nearly twice the bytes"


@pytest.mark.chapter("0.3")
def test_a_long_context_costs_both() -> None:
    config = find_config("qwen2-0.5b")
    short, long = (predict(config, MACHINE, quantize=FORMAT, prompt=n, answer=32) for n in (512, 8192))
    assert long.prefill < short.prefill and long.decode < short.decode


@pytest.mark.chapter("0.3")
def test_an_untied_table_is_not_read_whole() -> None:
    """Qwen2-7B's table of tokens is 0.3 GB of 4 bits; the head is as large, and is read."""
    decode = predict(find_config("qwen2-7b"), MACHINE, quantize=FORMAT, prompt=1, answer=2).decode
    assert 35 / 4.05 < decode < 35 / 3.9


@pytest.mark.slow
def test_a_machine_is_measured(kernels: None) -> None:
    machine = measure_machine(rounds=1)
    assert machine.bytes_s > 1e8 and machine.matrix_flops_s > 1e9 and machine.attention_flops_s > 1e8


@pytest.mark.slow
def test_the_command_measures_and_tells(kernels: None, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["memory", "--model", "demo", "--quantize", "4", "--context", "128", "--backend", "cpu"]
    assert cli.main([*asked, "--speed"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"At most [\d,.]+ tokens a second in answers, [\d,]+ in a prompt: .* GB/s", out), out
    assert cli.main(["memory", "--speed"]) == 2
    assert "give --quantize 4 or 8" in capsys.readouterr().err


@pytest.mark.chapter("0.3")
def test_a_batch_shares_the_weights() -> None:
    config = find_config("qwen2-0.5b")
    one, four = (
        predict(config, MACHINE, quantize=FORMAT, prompt=64, answer=2, batch=n).decode for n in (1, 4)
    )
    assert 3.8 < four / one < 4, "bound by bytes still, and those are read once"
