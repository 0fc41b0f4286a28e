"""tiny_llm as a side of a benchmark: its engine, with random weights of 4 bits in groups of 64."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from protocol import Config, serve

from tiny_llm.config import ModelConfig, Quantization
from tiny_llm.data import SamplingParams
from tiny_llm.engine.engine import Engine
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.models.footprint import read_bytes
from tiny_llm.models.loading import kv_dtype, load_model, weight_bytes
from tiny_llm.ops.backend import active, isa, set_threads, use
from tiny_llm.proving.record import Shapes
from tiny_llm.proving.trial import kernels_for
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.hub import resolve

BITS, GROUP = 4, 64
BLOCK = 16
STRIDE = 7919  # prompts' tokens are this far apart: all over the vocabulary, the same every time
SPARE = 64  # tokens that the first to begin may be ahead of the last


class Ours:
    """A model and an engine. Text is made of the tokens, by Qwen2's tokenizer if it is there.

    "ahead" prepares a step while the one before it runs, as users get it; "in turn" does not.
    """

    settings: Sequence[str] = ("in turn", "ahead")

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        set_threads(threads)
        checkpoint = _Noise(config)
        kept = kv_dtype(checkpoint.config, dtype=None, quantize=BITS)
        self._kernels = kernels_for(active(), Shapes.of(checkpoint.config, BITS, kept, BLOCK))
        with use(self._kernels.backend, self._kernels.ours):
            self._model = load_model(checkpoint, quantize=BITS)
        self._tokenizer = Tokenizer.from_folder(_tokenizer_folder())
        self._rows, self._engine = 1, self._made(1, 1)
        self.figures: dict[str, float] = {}  # microseconds of a step, by part
        self.about = {
            "version": f"{active()} {isa()}",
            "weight_bytes": weight_bytes(self._model),
            "read_bytes": read_bytes(checkpoint.config, 2, 4, Quantization(BITS, GROUP), tokens=1),
            "kernels": self._kernels.line,
        }

    def open(self, rows: int, room: int) -> None:
        """Make an engine for so many sequences."""
        self._rows, self._engine = rows, self._made(rows, room + SPARE)

    def prefill(self, setting: str, tokens: int) -> float:
        """A request of one token, on an engine that has seen nothing."""
        engine, prompt = self._made(1, tokens + 1), self._prompt(0, tokens)
        mx.reset_peak_memory()
        began = time.perf_counter()
        engine.add(prompt, SamplingParams(max_tokens=1))
        while len(engine):
            engine.step()
        seconds = time.perf_counter() - began
        self.figures = {"peak_bytes": mx.get_peak_memory()}
        return seconds

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Steps in which every sequence gets a token. Prompts are found again from the round before."""
        engine = self._engine
        engine.settings = replace(engine.settings, async_scheduling=setting == "ahead")
        params = SamplingParams(max_tokens=steps + SPARE, ignore_eos=True, speculate=False)
        numbers = [engine.add(self._prompt(row, context), params) for row in range(self._rows)]
        begun: set[int] = set()
        while len(begun) < self._rows:
            begun.update(number for number, _ in engine.step())
        parts = dict(engine.totals.parts)
        mx.reset_peak_memory()
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = time.perf_counter() - began
        self.figures = {
            f"{part}_us": 1e6 * (now - parts[part]) / steps for part, now in engine.totals.parts.items()
        }
        self.figures["step_us"] = 1e6 * seconds / steps
        self.figures["peak_bytes"] = mx.get_peak_memory()
        for number in numbers:
            engine.cancel(number)
        return seconds

    def streams(self, setting: str, rows: int, context: int, steps: int) -> float:
        """So many requests at once on an engine that has seen nothing."""
        engine = self._made(rows, context + steps)
        for row in range(rows):
            engine.add(self._prompt(row, context), SamplingParams(max_tokens=steps, ignore_eos=True))
        mx.reset_peak_memory()
        began = time.perf_counter()
        while len(engine):
            engine.step()
        seconds = time.perf_counter() - began
        self.figures = {"peak_bytes": mx.get_peak_memory()}
        return seconds

    def _made(self, rows: int, room: int) -> Engine:
        config = self._model.config
        kept = kv_dtype(config, dtype=None, quantize=BITS)
        return Engine(
            self._model,
            self._tokenizer,
            EngineSettings(
                kv_blocks=rows * (2 * room // BLOCK + 4),
                block_size=BLOCK,
                scheduler=SchedulerSettings(max_step_ms=1e6),  # nobody is kept waiting by a prompt here
            ),
            kernels=self._kernels,
            kv_dtype=kept,
            end_ids=(),
            max_context=config.max_position_embeddings,
        )

    def _prompt(self, row: int, tokens: int) -> list[int]:
        vocab = self._model.config.vocab_size
        return [(row * tokens + i + 1) * STRIDE % vocab for i in range(tokens)]


class _Noise(DummyCheckpoint):
    """Random weights in the shapes of a config.json's facts."""

    def __init__(self, config: Config) -> None:
        self.config = ModelConfig.from_hf(dict(config))


def _tokenizer_folder() -> Path:
    data = Path(os.environ.get("TINY_LLM_DATA", "../shared/data")) / "tokenizers" / "qwen2"
    return data if data.is_dir() else resolve("demo")


if __name__ == "__main__":
    with use(None):  # decided once, as in an engine
        serve(Ours)
