"""What main.py doctor finds unusual in a model's folder: each sign planted in a copy of the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from tiny_llm.cli import app
from tiny_llm.ops.backend import works
from tiny_llm.planning.doctor import unusual

Fields = dict[str, object]


def change(path: Path, how: Callable[[Fields], object]) -> None:
    fields = json.loads(path.read_text())
    how(fields)
    path.write_text(json.dumps(fields))


def test_nothing_is_unusual_in_the_bundled_model(demo: Path) -> None:
    assert list(unusual(demo)) == []


def test_a_norm_with_large_weights_is_named(demo_copy: Path) -> None:
    path, name = demo_copy / "model.safetensors", "model.layers.1.input_layernorm.weight"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    weights[name] = mx.where(mx.arange(weights[name].size) == 3, -96.5, weights[name]).astype(mx.bfloat16)
    mx.save_safetensors(str(path), weights)
    (line,) = unusual(demo_copy)
    assert line.startswith(f"norm weights up to 96.5 ({name})")


def test_a_stretched_context_is_told(demo_copy: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }

    def stretch(fields: Fields) -> None:
        fields.pop("rope_parameters", None)
        fields["rope_scaling"] = scaling

    change(demo_copy / "config.json", stretch)
    (line,) = unusual(demo_copy)
    assert line.startswith("a context of 1,024 tokens, trained on 128")


def test_missing_template_and_end_tokens_are_told(demo_copy: Path) -> None:
    (demo_copy / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (demo_copy / name).is_file():
            change(
                demo_copy / name,
                lambda fields: [fields.pop(n, None) for n in ("chat_template", "eos_token", "eos_token_id")],
            )
    template, end = unusual(demo_copy)
    assert template.startswith("no chat template")
    assert end.startswith("no end token")


def last_lines(*arguments: str) -> list[str]:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()[-4:]


def test_doctor_says_what_was_found_and_what_it_takes(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    unusual_line, memory, fits, speed = last_lines("--model", str(demo), "--backend", "ref")
    assert unusual_line == "unusual   nothing"
    assert memory.startswith("memory    ") and "5.2 M parameters" in memory
    assert "it fits" in fits
    assert speed.startswith("speed     not measured")


@pytest.mark.slow
@pytest.mark.skipif(not works(), reason="there are no CPU kernels")
def test_doctor_of_a_model_that_is_not_here_tells_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    unusual_line, *_, speed = last_lines("--model", "qwen2-0.5b", "--quantize", "4", "--backend", "cpu")
    assert unusual_line.startswith("unusual   its weights are not on disk")
    assert speed.startswith("speed     At most ")
