"""Chapter 2.1: what a token costs with and without a cache. Prints a table; --svg draws.

python book/experiments/kv_cache.py [--mistakes | --say] [--svg book/docs/img/kv_cache.svg]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import mlx.core as mx
from by_mistakes import told_with
from command_line import parser_of

from book.course.manifest import read_manifest
from tiny_llm.data import Batch, KVCache, SamplingParams
from tiny_llm.decoding.generate import Forward, generate, generate_without_cache, one_sequence, prefill
from tiny_llm.kv.dense import DenseCache
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_model
from tiny_llm.tokenizer.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "tiny_llm" / "demo"
LAYERS, END = 6, 2045  # of the bundled model: how many, and the token that ends an answer
ASKED = "What is 48 + 35?"
SIZES = (16, 64, 256, 1000)
ROUNDS = 7
SHOWN = 6
GREEDY = SamplingParams()


def passes(model: Forward, prompt: Sequence[int], tokens: int, *, cached: bool) -> list[list[int]]:
    """The positions that each pass through the model computes, for so many new tokens."""
    found: list[list[int]] = []

    def watched(batch: Batch, kv: KVCache) -> mx.array:
        found.append([int(p) for p in batch.positions.tolist()])
        return model(batch, kv)

    if cached:
        made = generate(watched, DenseCache(LAYERS), prompt, GREEDY)
    else:
        made = generate_without_cache(watched, prompt, GREEDY)
    assert len(list(islice(made, tokens))) == tokens
    return found


def said() -> str:
    """What the bundled model answers by way of ``generate`` and a DenseCache."""
    tokenizer, model = Tokenizer.from_folder(DEMO), load_model(DEMO, dtype="float32")
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": ASKED}]))
    ids = [token.id for token in islice(generate(model, DenseCache(LAYERS), prompt, GREEDY), 12)]
    end = ids.index(END) if END in ids else len(ids)
    return tokenizer.decode(ids[:end])


def mistakes() -> str:
    """What it answers with the chapter's first mistakes, every one in a process of its own."""
    lines = [f"{'mistake':<24} {ASKED}"]
    shown = [mutant.name for mutant in read_manifest()["2.1"].mutants[:SHOWN]]
    for name, told in told_with(__file__, "2.1", shown, "--say"):
        lines.append(f"{name:<24} {' '.join(told.split())}")
    return "\n".join(lines)


def milliseconds(call: Callable[[], mx.array]) -> float:
    """The median of some calls, each evaluated."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def costs(model: Forward, size: int) -> tuple[float, float]:
    """Milliseconds for token number ``size``: all of them again, and that one alone."""
    tokens = [token % 2000 for token in range(size)]
    cache = DenseCache(LAYERS)
    prefill(model, cache, tokens[:-1], 512)

    def newest() -> mx.array:
        cache.truncate(size - 1)
        return model(one_sequence(tokens[-1:], size - 1), cache)

    again = milliseconds(lambda: model(one_sequence(tokens, 0), NoCache()))
    return again, milliseconds(newest)


def table(model: Forward) -> str:
    """Rows of one answer, then milliseconds a token as the sequence grows."""
    rows = [sum(map(len, passes(model, range(20), 100, cached=cached))) for cached in (False, True)]
    lines = [
        f"rows for 100 tokens after a prompt of 20: {rows[0]:,} without a cache, {rows[1]:,} with one",
        "",
        "tokens so far   ms for one more, without   with",
    ]
    for size in SIZES:
        again, newest = costs(model, size)
        lines.append(f"{size:>13} {again:>26.1f} {newest:>6.1f}")
    return "\n".join(lines)


def picture(model: Forward) -> str:
    """Which positions each pass computes (full), and which are only looked at (pale), as an SVG."""
    side, parts = 22, list[str]()
    for column, cached in enumerate((False, True)):
        left = 30 + 380 * column
        steps = passes(model, range(4), 8, cached=cached)
        made = sum(map(len, steps))
        about = f"{'with' if cached else 'without'} a cache: {made} rows computed"
        parts.append(f'<text x="{left}" y="20">{about}</text>')
        for step, positions in enumerate(steps):
            y = 34 + step * side
            for at in range(max(positions) + 1):
                name = "" if at in positions else ' class="kept"'
                size = f'width="{side - 3}" height="{side - 3}"'
                parts.append(f'<rect{name} x="{left + at * side}" y="{y}" {size}/>')
            parts.append(f'<text x="{left + 11 * side + 8}" y="{y + 14}">pass {step + 1}</text>')
    style = "svg{background:#fff}rect{fill:#e6862b}.kept{fill:#f6dfc3}text{font:12px monospace;fill:#333}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 224"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--mistakes", action="store_true")
    parser.add_argument("--say", action="store_true")
    arguments = parser.parse_args()
    if arguments.mistakes or arguments.say:
        print(mistakes() if arguments.mistakes else said())
        return
    model = load_model(DEMO, dtype="float32")
    print(table(model))
    if arguments.svg:
        arguments.svg.write_text(picture(model), encoding="utf-8")


if __name__ == "__main__":
    main()
