"""Each mistake a user can make ends with exit code 2 and one line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_llm import cli
from tiny_llm.commands import loading

ROOT = Path(__file__).resolve().parents[1]


def main(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run main.py as its user does."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60, cwd=ROOT)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line here; return the one line that it must have printed."""
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (code, out, err)
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    return line


def config_with(**fields: object) -> Callable[[Path], None]:
    def break_it(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))

    return break_it


def weights_truncated(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def weights_flipped(model: Path) -> None:
    """One bit, in the header: the first letter of a tensor's name."""
    with (model / "model.safetensors").open("r+b") as file:
        header = file.read(4096)
        at = header.index(b'"model.layers') + 1
        file.seek(at)
        file.write(bytes([header[at] ^ 1]))


def weights_length_flipped(model: Path) -> None:
    """One bit, in the header's length: more than the file has."""
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(5)
        file.write(b"\x01")


def map_points_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def config_cut(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


BROKEN_MODELS: list[tuple[Callable[[Path], None], str]] = [
    (no_config, "no config.json"),
    (no_tokenizer, "no tokenizer.json"),
    (config_cut, "not valid JSON"),
    (config_with(model_type="qwen22"), "Did you mean 'qwen2'"),
    (config_with(rope_parameters={"rope_type": "spiral", "factor": 4.0}), "spiral"),
    (config_with(num_hidden_layers=-1), "num_hidden_layers is -1"),
    (config_with(num_hidden_layers=5, layer_types=None), "not expected: model.layers.5."),
    (config_with(num_hidden_layers=7, layer_types=None), "missing: model.layers.6."),
    (config_with(intermediate_size=700), "wrong shape"),
    (weights_truncated, "model.safetensors"),
    (weights_flipped, "model.layers"),
    (weights_length_flipped, "model.safetensors"),
    (map_points_outside, "outside"),
]


@pytest.mark.parametrize(("break_it", "says"), BROKEN_MODELS)
def test_a_broken_model(
    break_it: Callable[[Path], None], says: str, demo_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(demo_copy)
    assert says in complaint(capsys, "generate", "--model", str(demo_copy), "--prompt", "Hello")


BAD_ARGUMENTS: list[tuple[list[str], str]] = [
    (["--model", "qwen2-1.5"], "Did you mean 'qwen2-1.5b'"),
    (["--model", "no such model"], "There is no model 'no such model'"),
    (["--model", "/no/such/folder"], "There is no folder /no/such/folder"),
    (["--model", str(ROOT / "main.py")], "is a file"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--temperature", "hot"], "--temperature"),
    (["--max-tokens", "-1"], "max_tokens is -1"),
    (["--max-tokens", "0"], "max_tokens is 0"),
    (["--top-p", "-0.1"], "top_p is -0.1"),
    (["--top-k", "-1"], "top_k is -1"),
    (["--min-p", "inf"], "min_p is inf"),
    (["--seed", "-1"], "seed is -1"),
    (["--stop", ""], "stop is ('',)"),
    (["--dtype", "float8"], "'float8' is not one of"),
    (["--quantize", "5"], "quantize is 5, expected 4 or 8"),
    (["--system", "x", "--raw"], "--system needs the chat template"),
    (["--prompt"], "--prompt"),
    (["--promt", "x"], "--prompt"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in complaint(capsys, "generate", "--prompt", "Hello", *arguments)


@pytest.mark.parametrize("prompt", [["", "--raw"], [""], [" \n"]])
def test_an_empty_prompt(prompt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "prompt is empty" in complaint(capsys, "generate", "--prompt", *prompt)


def test_a_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "generate", "--prompt", "word " * 4000)
    assert "tokens, and this model's maximum context length is" in line


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'generate'" in complaint(capsys, "genrate")


def test_a_model_without_a_chat_template(demo_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((demo_copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (demo_copy / "tokenizer_config.json").write_text(json.dumps(config))
    (demo_copy / "chat_template.jinja").unlink(missing_ok=True)
    assert "generate --raw" in complaint(capsys, "generate", "--model", str(demo_copy), "--prompt", "Hello")


@pytest.mark.parametrize("command", [[], ["generate"], ["generate", "--raw"]])
def test_stdin_that_is_not_utf8(command: list[str]) -> None:
    done = main(*command, stdin=b"caf\xe9")
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    assert "not valid UTF-8 at byte 3" in line


def test_an_argument_that_is_not_utf8() -> None:
    command = [sys.executable, str(ROOT / "main.py"), "generate", "--prompt", b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    (line,) = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (2, b"") and "UTF-8" in line


def test_debug_adds_the_traceback() -> None:
    done = main("generate", "--prompt", "Hello", "--temperature", "nan", "--debug")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2 and "Traceback" in lines[0]
    assert lines[-1].startswith("error: temperature is nan")


def test_a_bug_of_ours_is_called_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in two\nlines")

    monkeypatch.setattr(loading, "LLM", fail)
    assert cli.main(["generate", "--prompt", "Hello"]) == 1
    _, err = capsys.readouterr()
    assert err == "error: ZeroDivisionError: in two lines (this is a bug; --debug shows where)\n"
