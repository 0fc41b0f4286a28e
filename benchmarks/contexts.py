"""What do named contexts save, and what does joining them independently cost in exactness?

The bundled model, pages of the book as documents. Time to the first token of a question behind them: all
computed, exact contexts the first time and again, independent ones in an order that was never seen. Then the
divergence (KL, nats) of the first token's distribution, and how often the likeliest token is the same,
between independent contexts and exact ones, by how many first tokens of each are computed anew. Medians.
Prints two tables and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

from tiny_llm import LLM, SamplingParams

PAGES = Path(__file__).resolve().parents[1] / "book" / "docs"
QUESTIONS = (
    "What is a KV cache?",
    "What does the scheduler decide?",
    "Why is decoding bound by memory?",
    "What is in a block?",
    "What does RoPE turn?",
    "How are weights quantized?",
)
FIRST = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=100)


def documents(llm: LLM, count: int, tokens: int) -> list[list[int]]:
    """The beginnings of so many pages."""
    pages = sorted(PAGES.rglob("*.md"), key=lambda page: -page.stat().st_size)[:count]
    return [llm.tokenizer.encode(page.read_text(encoding="utf-8"))[:tokens] for page in pages]


def first(llm: LLM, question: str, **options: object) -> tuple[float, dict[int, float]]:
    """Milliseconds to the first token, and its likeliest tokens' log-probabilities."""
    (answer,) = llm.generate([question], FIRST, **options)  # type: ignore[arg-type]
    assert answer.logprobs is not None
    return 1e3 * answer.timing.ttft_s, answer.logprobs[0]


def divergence(wanted: dict[int, float], got: dict[int, float]) -> float:
    """KL over the tokens that both tell of, and all others as one."""
    both = wanted.keys() & got.keys()
    pairs = [(math.exp(wanted[token]), math.exp(got[token])) for token in both]
    rest = tuple(max(1e-9, 1 - sum(side)) for side in zip(*pairs, strict=True))
    return sum(p * math.log(p / q) for p, q in [*pairs, rest])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160, help="of each document")
    parser.add_argument("--recompute", type=int, nargs="*", default=(0, 4, 16, 64))
    given = parser.parse_args()
    llm = LLM(given.model)
    texts = documents(llm, given.documents, given.tokens)
    names = [f"page {number}" for number in range(len(texts))]
    orders = list(itertools.permutations(range(len(texts))))
    computed, exact_ms, again, loose, wanted = [], [], [], [], {}
    plain = llm.with_engine(llm.engine.settings)
    for order, question in itertools.product(orders, QUESTIONS[:2]):
        own = llm.with_engine(llm.engine.settings)
        before = [token for number in order for token in texts[number]]
        (cold,) = own.generate([before + llm.tokenizer.encode(question)], FIRST)
        computed.append(1e3 * cold.timing.ttft_s)
    for name, text in zip(names, texts, strict=True):
        plain.contexts.add(name, text)
    for order in orders:
        own_names = [names[number] for number in order]
        for index, question in enumerate(QUESTIONS):
            ms, wanted[order, question] = first(plain, question, contexts=own_names)
            (again if index else exact_ms).append(ms)
    rows = []
    for recompute in given.recompute:
        off, same = [], []
        for order, question in itertools.product(orders, QUESTIONS):
            own_names = [names[number] for number in order]
            options = {"contexts": own_names, "join": "independent", "recompute": recompute}
            ms, got = first(plain, question, **options)
            if recompute == given.recompute[0] and question == QUESTIONS[0]:
                loose.append(ms)
            off.append(divergence(wanted[order, question], got))
            expected = wanted[order, question]
            same.append(max(got, key=got.__getitem__) == max(expected, key=expected.__getitem__))
        rows.append((recompute, statistics.mean(off), statistics.median(off), statistics.mean(same)))
    print(f"{given.documents} documents of {given.tokens} tokens, in every order: first token, ms")
    times = {
        "computed": computed,
        "exact, new order": exact_ms,
        "exact, again": again,
        "independent, new": loose,
    }
    medians = {what: statistics.median(taken) for what, taken in times.items()}
    for what, median in medians.items():
        print(f"{what:18} | {median:7.1f} | {medians['computed'] / median:5.1f}x")
    print("computed anew | KL, mean | KL, median | same likeliest token")
    for recompute, mean, median, equal in rows:
        print(f"{recompute:13} | {mean:8.3f} | {median:10.3f} | {equal:8.0%}")
    told = {"ms": medians, "independent": rows}
    print(json.dumps({"benchmark": "contexts", "model": given.model, **told}))


if __name__ == "__main__":
    main()
