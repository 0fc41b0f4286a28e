"""llama.cpp's look-up of coming tokens as a side of a benchmark: its Python binding, as its README says.

``llama_speculative.LlamaPromptLookupDecoding`` finds them; "2" and "10" are how many, which that README names
for CPUs and for GPUs. "plain" is the same binding without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from protocol import Config, serve
from random_gguf import gguf_of

DRAFTED: Mapping[str, int] = {"plain": 0, "look-up 2": 2, "look-up 10": 10}
ROUNDED = 256


class Counting(llama_cpp.Llama):
    """Counts its steps."""

    steps = 0

    def eval(self, tokens: Sequence[int]) -> None:
        """A step: a prompt, or the latest token and guesses behind it."""
        self.steps += 1
        super().eval(tokens)


class LookUp:
    """A model for each setting: it is told when it is made whether it looks up."""

    settings: Sequence[str] = tuple(DRAFTED)

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        self._path, self._threads = str(gguf_of(config, folder)), threads
        self._models: dict[str, Counting] = {}
        self.about = {"version": f"llama-cpp-python {llama_cpp.__version__}"}

    def open(self, rows: int, room: int) -> None:
        """Load the models. A prompt is one batch: logits of all tokens are kept, as many as a batch has.

        llama.cpp rounds a context up to a multiple of ``ROUNDED``, and guesses go up to there; the binding
        has room for as many tokens as it was told.
        """
        room = -(-room // ROUNDED) * ROUNDED
        assert rows == 1, "the binding answers one prompt at a time"
        for setting, drafted in DRAFTED.items():
            self._models[setting] = Counting(
                self._path,
                n_ctx=room,
                n_batch=room,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                draft_model=LlamaPromptLookupDecoding(num_pred_tokens=drafted) if drafted else None,
                verbose=False,
            )

    def answer(self, setting: str, prompt: list[int], tokens: int) -> Mapping[str, object]:
        """The greedy answer, and seconds and steps from its first token to its last."""
        model = self._models[setting]
        model.reset()
        made: list[int] = []
        for token in model.generate(prompt, temp=0.0):
            made.append(token)
            if len(made) == 1:
                began, steps = time.perf_counter(), model.steps
            if len(made) == tokens:
                break
        return {"seconds": time.perf_counter() - began, "steps": model.steps - steps, "answer": made}


if __name__ == "__main__":
    serve(LookUp)
