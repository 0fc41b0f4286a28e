"""The command line as its users meet it: child processes, pipes, and a real terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pexpect
import pytest
import typer

from tiny_llm import cli
from tiny_llm.errors import ConfigError
from tiny_llm.ops import backend
from tiny_llm.weights.names import short_names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "main.py")]
KEYS = [
    "model",
    "index",
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "ttft_s",
    "logprobs",
    "prefill_tok_s",
    "decode_tok_s",
    "peak_memory_bytes",
]
RAMBLE = ["--temperature", "4", "--seed", "9"]


BENCH_KEYS = [
    "model",
    "load_format",
    "quantize",
    "dtype",
    "activations",
    "prompt_tokens",
    "new_tokens",
    "batch",
    "rounds",
    "backend",
    "isa",
    "threads",
    "ops_on_ours",
    "same_tokens",
    "load_s",
    "prefill_tok_s",
    "decode_tok_s",
    "ttft_s",
    "peak_memory_bytes",
]


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, timeout=60, cwd=ROOT)


class Output:
    """What the command line printed when called in this process, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        code = cli.main()
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Output:
    return Output(capsys, monkeypatch)


def test_published_200_tokens_from_bos(stories260k: Path, call: Output) -> None:
    published = json.loads((stories260k / "expected_greedy_200.json").read_text())
    options = ["--raw", "--dtype", "float32", "--temperature", "0", "--json", "--model", str(stories260k)]
    code, out, err = call("generate", "--prompt", "<s>", "--max-tokens", "200", *options)
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["token_ids"] == published["greedy_ids_reproduced_here"]
    assert answer["text"] == published["expected_text"]
    short = json.loads(call("generate", "--prompt", "", "--max-tokens", "3", *options)[1])
    assert short["token_ids"] == answer["token_ids"][:3], "this tokenizer begins an empty text with BOS"


def test_json_is_one_line_with_the_answer_and_its_figures() -> None:
    done = run("generate", "--prompt", "Hello", "--max-tokens", "12", "--json", *RAMBLE)
    assert (done.returncode, done.stderr) == (0, b"")
    (line,) = done.stdout.decode().splitlines()
    answer = json.loads(line)
    assert list(answer) == KEYS
    assert answer["completion_tokens"] == len(answer["token_ids"]) <= 12
    assert answer["prompt_tokens"] > 1, "the template's tokens count"
    assert answer["finish_reason"] in ("stop", "length") and isinstance(answer["text"], str)
    assert answer["ttft_s"] > 0 and answer["prefill_tok_s"] > 0 and answer["decode_tok_s"] > 0
    assert 2**24 < answer["peak_memory_bytes"] < 2**34, "bytes, not KiB"


def test_generate_prints_the_answer_and_its_figures_apart(call: Output) -> None:
    _, line, _ = call("generate", "--prompt", "Hello", "--max-tokens", "9", "--json", *RAMBLE)
    code, out, err = call("generate", "--prompt", "Hello", "--max-tokens", "9", *RAMBLE)
    assert (code, out) == (0, json.loads(line)["text"] + "\n")
    assert len(err.splitlines()) == 1 and "9 answer tokens" in err and "tok/s" in err


def test_a_pipe_gives_the_prompt(call: Output) -> None:
    options = ["--max-tokens", "9", "--json", *RAMBLE]
    given = json.loads(call("generate", "--prompt", "Grüße", *options)[1])
    piped = json.loads(call("generate", *options, stdin="Grüße\n".encode())[1])
    assert piped["token_ids"] == given["token_ids"]


def test_piped_chat_prints_the_answer_alone(call: Output) -> None:
    expected = json.loads(call("generate", "--prompt", "Hello", "--max-tokens", "9", "--json")[1])["text"]
    for command in ([], ["chat"], ["--model", "demo"]):
        code, out, err = call(*command, *(["--max-tokens", "9"] if command else []), stdin=b"Hello\n")
        assert (code, err) == (0, "")
        assert out.startswith(expected) if not command else out == expected + "\n"


def test_options_reach_the_request(call: Output) -> None:
    def answer(*options: str) -> dict[str, Any]:
        return dict(json.loads(call("generate", "--prompt", "Hello", "-n", "12", "--json", *options)[1]))

    def ids(*options: str) -> list[int]:
        return list(answer(*options)["token_ids"])

    greedy, ramble = ids(), ids(*RAMBLE)
    assert ids(*RAMBLE) == ramble != greedy
    for narrowed in (["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "1"]):
        assert ids(*RAMBLE, *narrowed) == greedy, narrowed
    assert ids("--temperature", "4", "--seed", "2") != ramble
    assert answer("--system", "Be brief.")["prompt_tokens"] > answer()["prompt_tokens"]


def test_raw_leaves_the_template_out(call: Output) -> None:
    options = ["generate", "--prompt", "Hello", "-n", "3", "--json"]
    plain, chat = (json.loads(call(*options, *raw)[1])["prompt_tokens"] for raw in (["--raw"], []))
    assert plain < chat


def test_stop_may_be_given_twice(call: Output) -> None:
    options = ["generate", "--prompt", "Hello", "-n", "24", "--json", *RAMBLE]
    text = json.loads(call(*options)[1])["text"]
    answer = json.loads(call(*options, "--stop", "\x00never", "--stop", text[5:8])[1])
    assert (answer["text"], answer["finish_reason"]) == (text[: text.index(text[5:8])], "stop")


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantize_on_load_answers(call: Output, bits: str) -> None:
    code, out, err = call("generate", "--prompt", "Hello", "-n", "3", "--quantize", bits, "--json")
    assert (code, err) == (0, "") and json.loads(out)["completion_tokens"] >= 1


def test_models_lists_every_short_name(call: Output) -> None:
    code, out, _ = call("models")
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert code == 0 and set(rows) == {"demo", "demo-draft", *short_names()}
    for name, model in short_names().items():
        assert model.repo_id in rows[name] and rows[name].endswith(("yes", "no")) and "GB" in rows[name]


def test_help_teaches(call: Output) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for word in ("chat", "generate", "models", "python main.py", "qwen2-1.5b"):
        assert word in out
    code, out, _ = call("generate", "--help")
    for option in ("--prompt", "--raw", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p"):
        assert option in out
    for option in ("--seed", "--stop", "--dtype", "--quantize", "--offline", "--json", "--debug", "--model"):
        assert option in out


def test_help_says_where_the_default_command_s_options_are(call: Output) -> None:
    out = call("--help")[1]
    assert "python main.py chat --help" in " ".join(out.split())
    assert "--temperature" in call("chat", "--help")[1]
    assert call("--temperature", "1", "--help")[1] == call("chat", "--help")[1]


def test_main_py_names_every_command() -> None:
    first = (ast.get_docstring(ast.parse((ROOT / "main.py").read_text())) or "").splitlines()[0]
    missing = [name for name in typer.main.get_command(cli.app).commands if name not in first]  # type: ignore[attr-defined]
    assert not missing


def test_the_version_is_the_package_s_own(call: Output) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call("--version") == (0, f"tiny_llm {declared}\n", "")


def test_the_package_can_be_run_as_a_module() -> None:
    module = [sys.executable, "-m", "tiny_llm"]
    done = subprocess.run([*module, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m tiny_llm generate --prompt" in done.stdout, "its examples are as it was called"


def test_a_reader_that_leaves_is_no_error(endless: list[str]) -> None:
    child = subprocess.Popen(
        [*COMMAND, "generate", "--prompt", "Hello", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(timeout=60) == 141
    child.stderr.close()


def in_shell(redirections: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *COMMAND]
    return subprocess.run([*shell, *arguments], capture_output=True, timeout=60, cwd=ROOT)


def test_a_closed_stdin_is_an_empty_one() -> None:
    """Its number is free: the weights' file would get 0, which MLX takes for a failure."""
    done = in_shell("<&-", "generate", "--prompt", "Hello", "--max-tokens", "3")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = in_shell("<&-")
    assert done.returncode == 2 and done.stderr.startswith(b"error: The prompt is empty"), done.stderr


def test_a_closed_stdout_or_stderr_takes_what_is_written() -> None:
    quiet = in_shell(">&-", "generate", "--prompt", "Hello", "--max-tokens", "3")
    assert (quiet.returncode, quiet.stdout, quiet.stderr.count(b"\n")) == (0, b"", 1), quiet.stderr
    answer = in_shell("2>&-", "generate", "--prompt", "Hello", "--max-tokens", "3")
    assert answer.returncode == 0 and b"tokens" not in answer.stdout, "the figures are not the answer's"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["generate", "--prompt", "Hello", "--json"], ["models"], ["--help"]])
def test_a_full_disk_is_not_a_bug_of_ours(arguments: list[str]) -> None:
    done = in_shell(">/dev/full", *arguments)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and "No space left" in line and "bug" not in line


def hear_ctrl_c() -> None:
    """In the child: tests that run in the background of a script would have it ignored, as all else there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_generate_with_130(endless: list[str]) -> None:
    child = subprocess.Popen(
        [*COMMAND, "generate", "--prompt", "Hello", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )
    assert child.stdout is not None
    child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, b"")


def test_generate_in_a_terminal_needs_a_prompt() -> None:
    out, code = pexpect.run(f"{' '.join(COMMAND)} generate", withexitstatus=True, timeout=60, cwd=str(ROOT))
    assert code == 2 and out.splitlines() == [
        b"error: There is no prompt; give --prompt TEXT, or pipe a text in."
    ]


def test_large_weights_show_a_bar_that_goes_away() -> None:
    """Seen by a small model, once the border between small and large is moved."""
    code = (
        "from tiny_llm import cli; from tiny_llm.commands import loading; loading.LARGE_BYTES = 1; "
        "cli.main(['generate', '-p', 'Hi', '-n', '3'])"
    )
    environment = {**os.environ, "TERM": "xterm"}  # a dumb terminal shows no bar
    child = pexpect.spawn(
        sys.executable, ["-c", code], env=environment, cwd=str(ROOT), encoding="utf-8", timeout=60
    )
    child.expect("Loading.*MB")
    child.expect_exact("\r\x1b[K")  # back to its beginning, and the line cleared
    child.expect("tok/s")
    child.expect(pexpect.EOF)
    child.close()


SHORT_BENCH = ["bench", "--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1"]


def test_bench_prints_one_line_of_json() -> None:
    """In a process of its own: the number of threads is the process's."""
    done = run(*SHORT_BENCH, "--quantize", "4", "--threads", "1", "--batch", "2", "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert list(row) == BENCH_KEYS
    assert (row["model"], row["quantize"], row["batch"], row["prompt_tokens"]) == ("demo", 4, 2, 8)
    assert row["threads"] in (1, None), "None: ref has no threads"


def test_bench_prints_a_table(call: Output) -> None:
    code, out, _ = call(*SHORT_BENCH, "--backend", "ref")
    assert code == 0
    for words in ("prefill tok s", "decode tok s", "ttft s", "peak memory bytes", "backend", "demo", "ref"):
        assert words in out


def test_bench_of_what_cannot_be_is_one_line(call: Output) -> None:
    code, out, err = call("bench", "--model", "demo", "--load-format", "dummy")
    assert (code, out) == (2, "")
    assert err.startswith("error: There is no short name 'demo'") and err.count("\n") == 1
    code, _, err = call(*SHORT_BENCH, "--threads", "0")
    assert (code, err) == (2, "error: threads is 0, expected a whole number from 1 to 1024.\n")


def test_a_backend_is_forced_by_option_or_environment(call: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LLM_BACKEND", "ref")
    assert json.loads(call(*SHORT_BENCH, "--json")[1])["backend"] == "ref"
    monkeypatch.setenv("TINY_LLM_BACKEND", "abacus")
    assert json.loads(call(*SHORT_BENCH, "--json", "--backend", "ref")[1])["backend"] == "ref"
    code, _, err = call("generate", "--prompt", "Hello")
    expected = "one of ref, cpu, mlx, metal, metalsim, cuda"
    assert (code, err) == (2, f"error: backend is 'abacus', expected {expected}.\n")


@pytest.mark.parametrize("name", ["metalsim", "metal", "cuda"])
def test_our_gpu_kernels_give_the_tokens_of_ref(name: str, call: Output) -> None:
    try:
        backend.choose(name)
    except ConfigError as error:
        pytest.skip(str(error))
    options = ["--prompt", "What is a KV cache?", "--dtype", "float32", "--max-tokens", "8", "--json"]
    ours, ref = (json.loads(call("generate", *options, "--backend", b)[1]) for b in (name, "ref"))
    assert ours["token_ids"] == ref["token_ids"]


def test_answers_are_the_same_text_on_ref(call: Output) -> None:
    """Exact activations of an unquantized model; the draws are the same too."""
    options = ["--prompt", "What is a KV cache?", "--dtype", "float32", "--activations", "exact", "-n", "24"]
    default, ref = (call("generate", *options, *more)[1] for more in ([], ["--backend", "ref"]))
    assert default == ref
