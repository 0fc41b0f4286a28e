"""What does this runtime do on a Mac? Kernel tests, the kernels' proofs, the bundled model, speed, memory.

Nothing is downloaded: speed is measured on random 4-bit weights, both sides in turns, medians. Writes one
JSON file as it goes and prints a table to paste into an issue. A part that fails is in the report, and the
others go on; the exit code then is 1. ``--quick`` takes a tiny model, to see that all of it runs, anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import msgspec
from measure.sides import OURS
from measure.worker import WORKERS, Worker

from tiny_llm import LLM, SamplingParams
from tiny_llm.config import ModelConfig
from tiny_llm.ops.backend import BACKENDS, GPU_KERNELS, VARIABLE
from tiny_llm.planning.rounds import Trial, interleave
from tiny_llm.proving.record import Proof, Shapes, machine
from tiny_llm.proving.trial import Limits, proved
from tiny_llm.weights.names import config_of

ROOT = Path(__file__).resolve().parents[1]
PEER = "mlx-lm"
SETTINGS: Mapping[str, str] = {OURS: "ahead", PEER: "bfloat16"}
ON_THE_DEVICE = re.compile(r"[\[-](metal|cuda)[\]-]")
KERNEL_TESTS = ("tests/ops/test_metal*.py", "tests/sampling/test_metal*.py", "tests/ops/test_cuda*.py")
BITS, BLOCK = 4, 16
SUM = "83"
TINY: Mapping[str, object] = {
    **config_of("qwen2-0.5b"),
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Question:
    """One thing that both sides are asked: ``amount`` tokens, in the seconds that ``ask`` returns."""

    name: str
    rows: int
    room: int
    amount: int
    ask: Callable[[Worker, str], float]


@dataclass(frozen=True)
class Plan:
    """What to measure: models by name, sequences to decode, prompts to read, requests at once."""

    shapes: Mapping[str, Mapping[str, object]]
    rows: Sequence[int]
    context: int
    prompts: Sequence[int]
    streams: tuple[int, int, int]
    steps: int
    rounds: int
    only: str | None = None

    @classmethod
    def of(cls, *, quick: bool) -> Plan:
        """For a Mac; ``quick``: for a test."""
        if quick:
            return cls({"tiny": TINY}, (1, 2), 16, (16,), (2, 16, 4), 4, 1, only="test_swiglu")
        shapes = {name: config_of(name) for name in ("qwen2-0.5b", "qwen2-1.5b")}
        return cls(shapes, (1, 4, 16), 512, (512, 4096), (8, 128, 64), 32, 5)

    def questions(self) -> Iterator[Question]:
        """In the order of the table."""
        context, steps = self.context, self.steps
        for rows in self.rows:
            ask = partial(_decode, context, steps)
            yield Question(f"decode, {rows} x after {context}", rows, context + steps, rows * steps, ask)
        for tokens in self.prompts:
            yield Question(f"prompt of {tokens:,}", 1, tokens, tokens, partial(_prefill, tokens))
        rows, context, steps = self.streams
        ask = partial(_streams, rows, context, steps)
        yield Question(f"{rows} at once, {context} + {steps}", rows, context + steps, rows * steps, ask)


def _decode(context: int, steps: int, worker: Worker, setting: str) -> float:
    return worker.decode(setting, context, steps)


def _prefill(tokens: int, worker: Worker, setting: str) -> float:
    return worker.prefill(setting, tokens)


def _streams(rows: int, context: int, steps: int, worker: Worker, setting: str) -> float:
    return worker.streams(setting, rows, context, steps)


def facts(backend: str) -> dict[str, object]:
    """The machine, the system, the versions, the commit."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    device = mx.device_info()
    return {
        **machine(backend),
        "chip": device.get("device_name", platform.processor()),
        "memory_bytes": device.get("memory_size"),
        "python": platform.python_version(),
        "mlx_lm": version("mlx-lm"),
        "commit": commit.stdout.strip() or None,
    }


def kernel_tests(plan: Plan) -> dict[str, object]:
    """Run the tests of our kernels; how many ran on this device, and what failed there or elsewhere."""
    files = sorted(str(path) for pattern in KERNEL_TESTS for path in ROOT.glob(pattern))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        command += ["-k", plan.only] if plan.only else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.is_file():
            raise RuntimeError(
                f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
            )
        return counts(ElementTree.parse(report).getroot())


def counts(suite: ElementTree.Element) -> dict[str, object]:
    """Of a JUnit report: tests that ran, those of them on a device, those that failed with a line of why."""
    ran, on_device, failed = 0, 0, {}
    for case in suite.iter("testcase"):
        name = str(case.get("name"))
        if case.find("skipped") is not None:
            continue
        ran += 1
        on_device += bool(ON_THE_DEVICE.search(name))
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[name] = (problem.get("message") or "").splitlines()[:1]
    return {"ran": ran, "on_the_device": on_device, "failed": failed}


def proofs(plan: Plan, backend: str) -> dict[str, object]:
    """Of each model's shapes, what came of trying our kernels; nothing where the backend has none."""
    if backend not in GPU_KERNELS:
        return {}
    found = {}
    for name, config in plan.shapes.items():
        shapes = Shapes.of(ModelConfig.from_hf(dict(config)), BITS, mx.bfloat16, BLOCK)
        tried = proved(backend, shapes, Limits.of(backend))
        found[name] = {op: msgspec.to_builtins(proof) for op, proof in tried.items()}
    return found


def bundled(backend: str) -> dict[str, object]:
    """The bundled model's answers: are they right, and ``ref``'s to the letter, and how fast do they come?"""
    prompts = ["What is 48 + 35?", "What is paged attention?", "Tell me a story about a fox."]
    params = SamplingParams(max_tokens=48)
    texts: dict[str, list[str]] = {}
    for name in (backend, "ref"):
        with LLM("demo", backend=name, dtype="float32") as llm:
            answers = [llm.chat(prompt, params) for prompt in prompts]
            texts[name] = [answer.text for answer in answers]
            if name == backend:
                speed = answers[-1].timing.decode_tok_s
                line = llm.kernels.line
    same = sum(one == other for one, other in zip(texts[backend], texts["ref"], strict=True))
    return {
        "right": "right" if SUM in texts[backend][0] else f"wrong: {texts[backend][0]!r}",
        **{"same_as_ref": same, "of": len(prompts), "decode_tok_s": round(speed, 1), "kernels": line},
    }


def speed(plan: Plan, backend: str) -> dict[str, object]:
    """Tokens a second and peak memory of every model and question, ours and mlx-lm's."""
    os.environ[VARIABLE] = backend  # of the worker that is ours
    found: dict[str, object] = {}
    for name, config in plan.shapes.items():
        with ExitStack() as stack:
            sides = []
            for side, file in ((OURS, "ours.py"), (PEER, "mlxlm.py")):
                worker = Worker(side, [sys.executable, WORKERS / file], os.cpu_count() or 1)
                stack.enter_context(closing(worker))
                worker.load(name, config, ROOT)
                sides.append(worker)
            answers = {question.name: asked(question, sides, plan.rounds) for question in plan.questions()}
            found[name] = {"about": {side.name: dict(side.about) for side in sides}, "answers": answers}
    return found


def asked(question: Question, sides: Sequence[Worker], rounds: int) -> dict[str, object]:
    """Both sides' tokens a second, the median of the rounds, and the most memory that MLX had then."""
    for worker in sides:
        worker.open(question.rows, question.room)
    trials = [Trial((w.name,), question.amount, partial(question.ask, w, SETTINGS[w.name])) for w in sides]
    rates = interleave(trials, rounds, warm_up=1)
    tok_s = {worker.name: round(rates[(worker.name,)].median, 2) for worker in sides}
    peak = {worker.name: worker.figures()["peak_bytes"] for worker in sides}
    return {"tok_s": tok_s, "ratio": round(tok_s[OURS] / tok_s[PEER], 3), "peak_bytes": peak}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as Markdown, to paste into an issue."""
    about = report["machine"]
    memory = f", {about['memory_bytes'] / 2**30:.0f} GiB" if about["memory_bytes"] else ""
    system = f"{'macOS ' if sys.platform == 'darwin' else ''}{about['system'].partition(' Darwin')[0]}"
    versions = f"{system}, MLX {about['mlx']}, mlx-lm {about['mlx_lm']}, commit {about['commit']}"
    yield f"**{about['chip']}{memory}**, {versions}, backend `{report['backend']}`"
    yield ""
    tests = report["kernel_tests"]
    if "error" not in tests:
        ran = f"{tests['ran']} ran, {tests['on_the_device']} of them on the device"
        yield f"- Kernel tests: {ran}, {len(tests['failed'])} failed"
        yield from (f"  - `{name}`: {' '.join(why)}" for name, why in tests["failed"].items())
    demo = report["bundled_model"]
    if "error" not in demo:
        same = f"{demo['same_as_ref']} of {demo['of']} answers are `ref`'s"
        yield f"- Bundled model: {demo['right']}, {same}, {demo['decode_tok_s']} tok/s. {demo['kernels']}"
    yield from (f"- {part} failed: `{report[part]['error']}`" for part in PARTS if "error" in report[part])
    yield from _proof_table(report["proofs"])
    yield from _speed_table(report["speed"])


def _proof_table(proofs: Mapping[str, Any]) -> Iterator[str]:
    if not proofs or "error" in proofs:
        return
    yield from ("", "| model | kernel | shape | ours, us | MLX, us | ratio | wrong |", "|" + "---|" * 7)
    for model, ops in proofs.items():
        for op, stored in ops.items():
            proof = msgspec.convert(stored, Proof)
            for one in proof.timings:
                times = f"{one.ours_us:.1f} | {one.mlx_us:.1f} | {one.ratio:.2f}x"
                yield f"| {model} | {op} | {one.shape} | {times} | |"
            if not proof.timings:
                yield f"| {model} | {op} | | | | | {proof.wrong} |"


def _speed_table(speed: Mapping[str, Any]) -> Iterator[str]:
    if "error" in speed:
        return
    yield from ("", f"| tokens a second | ours | {PEER} | ratio | ours, GB | {PEER}, GB |", "|" + "---|" * 6)
    for model, found in speed.items():
        for question, one in found["answers"].items():
            tok_s, peak = one["tok_s"], one["peak_bytes"]
            memory = f"{peak[OURS] / 1e9:.2f} | {peak[PEER] / 1e9:.2f}"
            rates = f"{tok_s[OURS]:,.1f} | {tok_s[PEER]:,.1f} | {one['ratio']:.2f}x"
            yield f"| {model}, {question} | {rates} | {memory} |"


PARTS = ("kernel_tests", "proofs", "bundled_model", "speed")


def main() -> None:
    """Do each part, write what there is after each, and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: only to see that it runs")
    parser.add_argument("--backend", choices=BACKENDS, default="metal" if mx.metal.is_available() else "mlx")
    parser.add_argument("--out", type=Path, default=Path("mac-report.json"))
    options = parser.parse_args()
    plan, backend = Plan.of(quick=options.quick), options.backend
    report: dict[str, Any] = {"benchmark": "mac_report", "backend": backend, "machine": facts(backend)}
    parts: Mapping[str, Callable[[], object]] = {
        "kernel_tests": lambda: kernel_tests(plan),
        "proofs": lambda: proofs(plan, backend),
        "bundled_model": lambda: bundled(backend),
        "speed": lambda: speed(plan, backend),
    }
    for name, part in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        report[name] = _kept(part)
        options.out.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    print("\n".join(table(report)))
    print(json.dumps({"benchmark": "mac_report", "written": str(options.out), "failed": failures(report)}))
    sys.exit(bool(failures(report)))


def _kept(part: Callable[[], object]) -> object:
    """What a part returns, or its error: the others go on."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def failures(report: Mapping[str, Any]) -> list[str]:
    """The parts that failed, the tests that did, and the kernels that are wrong. Nothing about times."""
    failed = [part for part in PARTS if "error" in report[part]]
    failed += report["kernel_tests"].get("failed", {})
    if "proofs" not in failed:
        failed += [
            f"{model}: {op}: {proof['wrong']}"
            for model, ops in report["proofs"].items()
            for op, proof in ops.items()
            if proof["wrong"]
        ]
    demo = report["bundled_model"]
    if demo.get("right", "right") != "right":
        failed.append(f"the bundled model is {demo['right']}")
    return failed


if __name__ == "__main__":
    main()
