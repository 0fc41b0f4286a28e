"""Chapter 1.7: the bundled model's stories at several temperatures. Prints a table; --svg draws.

python book/experiments/sampling.py [--svg book/docs/img/sampling.svg]
"""

from __future__ import annotations

from html import escape

import mlx.core as mx
from command_line import parser_of
from rope import DEMO

from tiny_llm import LLM, SamplingParams
from tiny_llm.data import Completion
from tiny_llm.decoding.generate import one_sequence
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_model
from tiny_llm.sampling.sampler import filter_logits

PROMPT = [{"role": "user", "content": "Tell me a short story about a fox."}]
STORIES, NATS_A_BIT = 8, 0.6931
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 1.0},
    {"temperature": 1.5},
    {"temperature": 2.0},
    {"temperature": 3.0},
    {"temperature": 3.0, "top_k": 5},
    {"temperature": 3.0, "top_p": 0.9},
    {"temperature": 3.0, "min_p": 0.2},
)


def stories(llm: LLM, ids: list[int], options: dict[str, float]) -> list[Completion]:
    """Some stories, each with a seed of its own."""
    every = [
        SamplingParams(max_tokens=80, seed=seed, logprobs=0, **options)  # type: ignore[arg-type]
        for seed in range(STORIES)
    ]
    return [llm.generate(ids, params)[0] for params in every]


def surprise(story: Completion) -> float:
    """What a token of it was worth to the model, in bits: 1 for an even chance."""
    assert story.logprobs is not None
    chosen = [row[token] for row, token in zip(story.logprobs, story.token_ids, strict=True)]
    return -sum(chosen) / len(chosen) / NATS_A_BIT


def table(llm: LLM) -> str:
    """A row for each way to draw."""
    ids = llm.chat_prompt(PROMPT)
    lines = [f"drawn by            different, of {STORIES}  bits a token  one of them, later on"]
    for options in SETTINGS:
        found = stories(llm, ids, options)
        name = ", ".join(f"{key} {value:g}" for key, value in options.items())
        name = name.replace("temperature", "T").replace("_", "-")
        bits = sum(map(surprise, found)) / STORIES
        later = " ".join(found[1].text.split())[56:104].strip()
        lines.append(f"{name:<20} {len({s.text for s in found}):>14} {bits:>13.2f}  {later}")
    return "\n".join(lines)


def picture(llm: LLM) -> str:
    """The ten likeliest tokens where the greedy story leaves about 2 bits open, at three temperatures."""
    prompt = llm.chat_prompt(PROMPT)
    story = llm.generate(prompt, SamplingParams(max_tokens=40))[0].token_ids
    ids = [*prompt, *story]
    batch = one_sequence(ids, start=0)
    rows = mx.arange(len(prompt) - 1, len(ids) - 1)
    logits = load_model(DEMO, dtype="float32")(
        type(batch)(batch.tokens, batch.positions, batch.query_start_loc, rows), NoCache()
    )
    shares = mx.softmax(logits, axis=-1)
    least = int(mx.argmin(mx.abs(2 + mx.sum(shares * mx.log2(shares + 1e-9), axis=-1))).item())
    row = logits[least : least + 1]
    best = mx.argsort(-row[0])[:10].tolist()
    tokenizer = llm.tokenizer
    parts = []
    begun = tokenizer.decode(list(story[:least])).replace("\n", " ")
    parts.append(f'<text x="10" y="18">the story so far: {escape(" ".join(begun.split()[-11:]))}</text>')
    for column, temperature in enumerate((0.5, 1.0, 2.0)):
        scores = mx.exp(filter_logits(row, [SamplingParams(temperature=temperature)]))[0]
        chances = (scores / mx.sum(scores)).tolist()
        x = 100 + column * 210
        parts.append(f'<text x="{x}" y="46">temperature {temperature:g}</text>')
        for rank, token in enumerate(best):
            y, long = 56 + rank * 22, 170 * chances[token]
            parts.append(f'<rect x="{x}" y="{y}" width="{long:.1f}" height="17"/>')
            parts.append(f'<text x="{x + long + 4:.1f}" y="{y + 13}">{100 * chances[token]:.0f}%</text>')
            if not column:
                word = escape(tokenizer.decode([token]).strip() or repr(tokenizer.decode([token])))
                parts.append(f'<text class="end" x="90" y="{y + 13}">{word}</text>')
        rest = abs(1 - sum(chances[token] for token in best))
        parts.append(f'<text x="{x}" y="292">all others {100 * rest:.0f}%</text>')
    style = "svg{background:#fff}rect{fill:#e6862b}text{font:12px monospace;fill:#333}.end{text-anchor:end}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 304"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    llm = LLM("demo", dtype="float32")
    print(table(llm))
    if arguments.svg:
        arguments.svg.write_text(picture(llm), encoding="utf-8")


if __name__ == "__main__":
    main()
