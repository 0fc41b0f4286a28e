"""Kernels that prove wrong are replaced by the floor's, end to end, on metalsim; and it is said."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_llm import LLM, SamplingParams
from tiny_llm.cli import app
from tiny_llm.errors import ConfigError
from tiny_llm.metalsim.build import why_not
from tiny_llm.metalsim.run import watch
from tiny_llm.ops.metal import FOLDER, folder
from tiny_llm.proving.choice import OPS
from tiny_llm.server.prometheus import exposition

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = "12 + 30 ="


DENSE = tuple(op for op in OPS if op != "experts")
"""The ops of a model that has no experts."""


@pytest.fixture(autouse=True)
def _simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setattr("tiny_llm.proving.record.user_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("TINY_LLM_METALSIM", "fast")


def tokens(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, GREEDY)[0].token_ids


@pytest.mark.slow
def test_a_broken_kernel_is_the_floors_and_answers_are_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for of in ("metal", "cuda"):
        shutil.copytree(folder(of), tmp_path / "kernels" / of)
    broken = tmp_path / "kernels" / "metal" / "rms_norm.metal"
    broken.write_text(broken.read_text().replace("-> (total, out)\n", "-> (total, out)\n#define eps 0.5f\n"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "kernels"))
    with LLM(backend="metalsim", kernels="mlx", quantize=4) as floor:
        expected = tokens(floor)
        assert floor.engine.stats().ops_on_ours == ()
    said: list[str] = []
    with LLM(backend="metalsim", kernels="ours", quantize=4, trying=lambda _, what: said.append(what)) as llm:
        assert tokens(llm) == expected
        right = tuple(op for op in DENSE if op != "rms_norm")
        assert llm.kernels.ours == set(right)
        assert "MLX's for rms_norm (a sum and its norm: off by" in llm.kernels.line
        stats = llm.engine.stats()
        assert stats.ops_on_ours == right and not stats.same_tokens
        told = exposition(stats, "demo", 0).decode()
        assert 'tiny_llm_op_on_our_kernel{model_name="demo",op="rms_norm"} 0.0' in told
        assert 'tiny_llm_op_on_our_kernel{model_name="demo",op="rope"} 1.0' in told
        assert 'tiny_llm_same_tokens{model_name="demo"} 0.0' in told
    assert "rms_norm: a sum and its norm" in said
    with LLM(backend="metalsim", quantize=4) as all_ours:
        assert tokens(all_ours) != expected, "the case: the broken kernel would be seen"
    with pytest.raises(
        ConfigError, match=r"did not prove right on this machine: rms_norm \(a sum and its no"
    ):
        LLM(backend="metalsim", quantize=4, same_tokens=True, kernels="ours")


def test_metalsim_runs_all_of_ours_untried_unless_asked() -> None:
    with LLM(backend="metalsim") as llm:
        assert llm.kernels.ours is None and not llm.kernels.line
        assert llm.engine.stats().same_tokens and llm.engine.stats().ops_on_ours == OPS


@pytest.mark.slow
def test_pages_of_int8_are_read_by_our_kernels_and_tokens_are_those_of_ref() -> None:
    with LLM(backend="ref", kv_dtype="int8", speculate="off") as ref:
        expected = tokens(ref)
    with LLM(backend="metalsim", kv_dtype="int8") as llm, watch() as seen:
        assert tokens(llm) == expected
    names = {name for name, _ in seen}
    assert names >= {"kv_write_int8", "paged_attention", "paged_attention_tile"} and "kv_write" not in names


def test_the_start_says_where_kernels_are_mlxs() -> None:
    options = ["--backend", "metalsim", "--kernels", "mlx", "--prompt", "Hi", "--max-tokens", "1"]
    done = CliRunner().invoke(app, ["generate", *options])
    assert done.exit_code == 0, done.output
    assert "Kernels: MLX's; tokens may depend on what else is running (--same-tokens" in done.stderr


@pytest.mark.slow
def test_guesses_of_a_draft_model_are_checked_by_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_llm.scheduler.drafts.Worth.length", lambda self, share, most: min(most, 3))
    asked = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(backend="ref", speculate="off") as ref:
        prompt = ref.chat_prompt([{"role": "user", "content": "What is prefill?"}])
        expected = ref.generate([prompt], asked)[0].token_ids
    with LLM(backend="metalsim", draft="demo-draft") as llm:
        answer = llm.generate([prompt], asked)[0]
    assert answer.token_ids == expected and answer.accepted_tokens > 2


@pytest.mark.slow
def test_a_server_says_so_too() -> None:
    main = Path(__file__).resolve().parents[2] / "main.py"
    command = [sys.executable, str(main), "serve", "--port", "0", "--backend", "metalsim", "--kernels", "mlx"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = list(itertools.takewhile(lambda line: not line.startswith("Serving"), server.stderr))
        server.terminate()
        server.communicate()
    assert said[-1].startswith("Kernels: MLX's; tokens may depend on what else is running")
    assert server.returncode == 0
