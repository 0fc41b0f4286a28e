"""What does guessing tokens bring? With and without, interleaved; medians.

On ``--shape`` with random weights: guesses that are always right and such that are right seven times in ten,
from a script that knows the answer; and n-gram look-up where there is nothing to find, for one sequence and
for 16. On the bundled model: n-gram look-up where the answer repeats the prompt. Both sides must give the
same tokens. And how often the bundled draft is right, drawing with the answer's noise and with noise of its
own. Prints a table and one JSON line.

``--against llamacpp`` instead compares look-up with that of llama.cpp's Python binding, on ``--shape`` with
weights of which the text is known (measure/foretold.py): all sides must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from measure.environments import PeerMissing, default_folder, python_of
from measure.foretold import ForetoldCheckpoint, foretold_facts, loads
from measure.sides import OURS
from measure.worker import WORKERS, Worker

from tiny_llm import LLM, SamplingParams
from tiny_llm.config import ModelConfig
from tiny_llm.data import Drafter, Sequence
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.ops.backend import set_threads
from tiny_llm.sampling.sampler import sample
from tiny_llm.scheduler.drafts import Acceptance, Worth
from tiny_llm.scheduler.speculation import Speculation

K = 4
LOOK_UPS = {"llamacpp": "llamacpp_lookup.py"}
"""Which worker is asked for a peer's look-up."""
ASKS = (
    "What is paged attention?",
    "What is a KV cache?",
    "What is prefill?",
    "What is continuous batching?",
    "Tell me a story.",
    "Tell me a story about a fox.",
    "Tell me a story about a boat.",
    "What is 48 + 35?",
    "Why do leaves fall?",
    "Write a list of three animals.",
)
TEXT = (
    "Paged attention keeps keys and values in blocks of sixteen tokens. A block table maps each sequence to "
    "its blocks. A block that is full and shared is never copied. When memory runs out, a sequence gives its "
    "blocks back and is computed again later. "
)
RECORDS = "\n".join(
    json.dumps({"id": n, "name": f"block {n}", "state": "free", "owner": None}) for n in range(12)
)


@dataclass(frozen=True)
class Run:
    """One round: tokens of each answer; behind the first of each, how many, seconds, steps; and guesses."""

    answers: list[list[int]]
    tokens: int
    seconds: float
    steps: int
    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def tokens_a_step(self) -> float:
        """Of each answer."""
        return self.tokens / self.steps / len(self.answers)


def scripted(answer: Listed[int], right: float) -> Drafter:
    """Guesses of a sequence whose answer is known; each is right with that chance, by position alone."""

    def draft(seq: Sequence, most: int) -> array[int]:
        at = len(seq.tokens) - seq.prompt_len
        known = answer[at : at + min(most, K)]
        return array(
            "i", [t if random.Random(at + n).random() < right else t ^ 1 for n, t in enumerate(known)]
        )

    return draft


def run(llm: LLM, prompts: Listed[list[int]], params: SamplingParams, drafter: Drafter | str) -> Run:
    """Answer the prompts on a fresh engine, whose first tokens are not timed."""
    mode = "ngram" if drafter == "ngram" else "off"
    engine = llm.with_engine(EngineSettings(kv_blocks=2048, speculate=mode)).engine
    if not isinstance(drafter, str):
        engine.scheduler.speculation = Speculation({"script": drafter})
    numbers = [engine.add(prompt, replace(params, seed=n)) for n, prompt in enumerate(prompts)]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    began, steps, early = 0.0, 0, 0
    while len(engine):
        if not began and all(answers.values()):
            began, steps, early = time.perf_counter(), engine.totals.steps, sum(map(len, answers.values()))
        for number, chunk in engine.step():
            answers[number] += chunk.token_ids
    seconds = time.perf_counter() - began
    stats = engine.stats()
    return Run(
        list(answers.values()),
        sum(map(len, answers.values())) - early,
        seconds,
        engine.totals.steps - steps,
        sum(stats.drafted_tokens.values()),
        sum(stats.accepted_tokens.values()),
    )


def compare(
    name: str,
    llm: LLM,
    prompts: Listed[list[int]],
    params: SamplingParams,
    drafter: Drafter | str,
    rounds: int,
) -> dict[str, object]:
    """A row of the table."""
    plain, guessed = [], []
    for _ in range(rounds):
        plain.append(run(llm, prompts, params, "off"))
        guessed.append(run(llm, prompts, params, drafter))
        assert guessed[-1].answers == plain[-1].answers, "another answer with guesses than without"
    alone, with_guesses = (statistics.median(r.rate for r in side) for side in (plain, guessed))
    last = guessed[-1]
    found: dict[str, object] = {
        "case": name,
        "plain_tok_s": round(alone, 1),
        "guessed_tok_s": round(with_guesses, 1),
        "ratio": round(statistics.median(g.rate / p.rate for g, p in zip(guessed, plain, strict=True)), 3),
        "tokens_a_step": round(last.tokens_a_step, 2),
        "drafted": last.drafted,
        "accepted": last.accepted,
    }
    print(
        f"{name:<34}{alone:>9.1f}{with_guesses:>9.1f}{found['ratio']:>8.2f}x{found['tokens_a_step']:>9.2f}"
        f"{last.accepted:>7} of {last.drafted}",
        flush=True,
    )
    return found


def acceptance(llm: LLM, temperature: float, *, shared: bool) -> dict[str, object]:
    """How many guesses of the draft model were right, K at a time, until one was wrong.

    Not ``shared``: it draws with other noise than its answer.
    """
    guesses: list[tuple[int, int]] = []

    def drawn(logits: mx.array, params: Listed[SamplingParams], positions: Listed[int]) -> mx.array:
        other = [replace(one, seed=(one.seed or 0) ^ 0x5DEECE66D) for one in params]
        return sample(logits, params if shared else other, positions)

    prompts = [llm.chat_prompt([{"role": "user", "content": ask}]) for ask in ASKS]
    params = [SamplingParams(max_tokens=60, temperature=temperature, seed=n) for n in range(len(ASKS))]
    own = llm.with_engine(EngineSettings(kv_blocks=512, speculate="draft"))
    with (
        patch("tiny_llm.engine.draft.sample", drawn),
        patch.object(Worth, "length", lambda self, share, most: min(most, K)),
        patch.object(Acceptance, "observe", lambda self, drafted, right: guesses.append((drafted, right))),
    ):
        own.generate(prompts, params)
    right = sum(accepted for _, accepted in guesses)
    looked_at = right + sum(accepted < drafted for drafted, accepted in guesses)
    stats = own.engine.stats()
    found: dict[str, object] = {
        "temperature": temperature,
        "shared_noise": shared,
        "acceptance": round(right / looked_at, 3),
        "guesses": looked_at,
        "tokens_a_step": round(1 + sum(stats.accepted_tokens.values()) / stats.totals.decodes, 2),
    }
    name = f"draft, T {temperature}, {'the same' if shared else 'other'} noise"
    print(f"{name:<34}{right:>26} of {looked_at}{right / looked_at:>8.0%}{found['tokens_a_step']:>9}")
    return found


Ask = Callable[[list[int], int], Run]
"""A prompt and how many tokens to answer, to how that went."""


@contextmanager
def sides(options: argparse.Namespace, room: int) -> Iterator[dict[tuple[str, str], Ask]]:
    """Who looks up, and how: ours and the peer, each without first."""
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(ForetoldCheckpoint(options.shape), quantize=4))
        set_threads(options.threads)
        found: dict[tuple[str, str], Ask] = {
            (OURS, "plain"): partial(ask_ours, llm, "off"),
            (OURS, "look-up"): partial(ask_ours, llm, "ngram"),
        }
        name = options.against
        command = [python_of(name, options.folder), WORKERS / LOOK_UPS[name]]
        worker = stack.enter_context(closing(Worker(name, command, options.threads)))
        worker.load(options.shape, foretold_facts(options.shape), options.folder / "models")
        worker.open(1, room)
        yield found | {(name, setting): partial(ask_peer, worker, setting) for setting in worker.settings}


def ask_ours(llm: LLM, drafter: str, prompt: list[int], tokens: int) -> Run:
    """Of our engine."""
    return run(llm, [prompt], SamplingParams(max_tokens=tokens, ignore_eos=True), drafter)


def ask_peer(worker: Worker, setting: str, prompt: list[int], tokens: int) -> Run:
    """Of the peer."""
    told = worker.answer(setting, prompt, tokens)
    return Run([told["answer"]], tokens - 1, told["seconds"], told["steps"], 0, 0)


def compare_sides(options: argparse.Namespace) -> None:
    """Each side with and without look-up, on loads whose answers are known; print that."""
    vocab = ModelConfig.from_hf(foretold_facts(options.shape)).vocab_size
    known = loads(vocab, options.tokens)
    rows = []
    room = max(len(prompt) + len(answer) for prompt, answer in known.values()) + 1
    with sides(options, room) as asks:
        for name, (prompt, answer) in known.items():
            print(f"{name:<34}{'tok/s':>9}{'ratio':>10}{'a step':>9}")
            runs: dict[tuple[str, str], list[Run]] = {key: [] for key in asks}
            for _ in range(options.rounds):
                for key, ask in asks.items():
                    runs[key].append(ask(prompt, len(answer)))
                    assert runs[key][-1].answers == [answer], f"{key} gave another answer to {name!r}"
            rows += [show_side(name, key, of, runs[key[0], "plain"]) for key, of in runs.items()]
    facts = {"benchmark": "speculative", "shape": options.shape, "against": options.against}
    print(json.dumps(facts | {"threads": options.threads, "results": rows}))


def show_side(load: str, key: tuple[str, str], runs: list[Run], plain: list[Run]) -> dict[str, object]:
    """A row of that table: ``ratio`` is to the same side without look-up, in the same rounds."""
    rate = statistics.median(run.rate for run in runs)
    ratio = statistics.median(own.rate / other.rate for own, other in zip(runs, plain, strict=True))
    print(f"{', '.join(key):<34}{rate:>9.1f}{ratio:>9.2f}x{runs[-1].tokens_a_step:>9.2f}", flush=True)
    return {
        "load": load,
        "side": ", ".join(key),
        "tok_s": round(rate, 1),
        "ratio": round(ratio, 3),
        "tokens_a_step": round(runs[-1].tokens_a_step, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", choices=[*LOOK_UPS], help="compare look-up with this peer's")
    parser.add_argument("--threads", type=int, default=2, help="with --against")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where peers.py put the peers")
    parser.add_argument("--shape", default="qwen2-0.5b", help="short name of the random model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    options = parser.parse_args()
    if options.against:
        try:
            return compare_sides(options)
        except PeerMissing as missing:
            parser.error(str(missing))
    print(f"{'':<34}{'plain':>9}{'guessed':>9}{'ratio':>9}{'a step':>9}   right")
    rows = []

    def row(
        name: str, llm: LLM, prompts: Listed[list[int]], params: SamplingParams, of: Drafter | str
    ) -> None:
        rows.append(compare(name, llm, prompts, params, of, options.rounds))

    with LLM(DummyCheckpoint(options.shape), quantize=4) as llm:
        vocab = llm.config.vocab_size
        prompts = [[(n * 7919 + i * 104729) % vocab for i in range(1, 17)] for n in range(16)]
        free = SamplingParams(max_tokens=options.tokens, temperature=1.0, ignore_eos=True)
        answer = run(llm, prompts[:1], free, "off").answers[0]
        row(f"{options.shape}, always right, k {K}", llm, prompts[:1], free, scripted(answer, 1.0))
        row(f"{options.shape}, right 7 in 10, k {K}", llm, prompts[:1], free, scripted(answer, 0.7))
        row("n-gram, nothing to find", llm, prompts[:1], free, "ngram")
        row("n-gram, nothing to find, 16 at once", llm, prompts, free, "ngram")
    with LLM("demo") as llm:
        greedy = SamplingParams(max_tokens=3 * options.tokens, ignore_eos=True)
        for name, text in (("repeats a text", TEXT), ("repeats records", RECORDS)):
            prompt = llm.chat_prompt([{"role": "user", "content": f"Say this again: {text}"}])
            row(f"bundled model, {name}", llm, [prompt], greedy, "ngram")
    print(f"{'':<34}{'guesses right':>30}{'a step':>17}")
    with LLM("demo", draft="demo-draft") as llm:
        sides = ((0.0, True), (0.7, True), (0.7, False), (1.0, True), (1.0, False))
        accepted = [acceptance(llm, temperature, shared=shared) for temperature, shared in sides]
    print(
        json.dumps(
            {"benchmark": "speculative", "shape": options.shape, "results": rows, "acceptance": accepted}
        )
    )


if __name__ == "__main__":
    main()
