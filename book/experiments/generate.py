"""Chapter 1.6: an answer, step by step, and what may be shown of it. Prints a table; --svg draws.

python book/experiments/generate.py [--svg book/docs/img/generate.svg]
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import exp
from typing import NamedTuple

from command_line import parser_of
from rope import DEMO

from tiny_llm.data import SamplingParams
from tiny_llm.decoding.generate import generate_without_cache
from tiny_llm.decoding.stop import open_length
from tiny_llm.models.loading import load_model
from tiny_llm.tokenizer.tokenizer import Tokenizer

QUESTION, STOP = "What is 48 + 35?", "= 84"
LIMIT = 16


class Step(NamedTuple):
    """One token: rows that the model ran for it, its text, its chance, and what is held back after it."""

    rows: int
    text: str
    chance: float
    held: str


def steps() -> Iterator[Step]:
    """Generate without a cache, up to the end of the answer."""
    tokenizer, model = Tokenizer.from_folder(DEMO), load_model(DEMO, dtype="float32")
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.encode(tokenizer.render_chat(chat), add_special_tokens=False)
    text = ""
    tokens = generate_without_cache(model, ids, SamplingParams(logprobs=0))
    for number, token in enumerate(islice(tokens, LIMIT)):
        assert token.logprobs is not None
        piece = tokenizer.decode([token.id], skip_special_tokens=False)
        text += piece
        held = text[len(text) - open_length(text, [STOP]) :]
        yield Step(len(ids) + number, piece, exp(token.logprobs[token.id]), held)
        if token.id in tokenizer.eos_ids:
            return


def table(made: list[Step]) -> str:
    """A row a step."""
    lines = [f"stop string: {STOP!r}", "", "step  rows  token           chance  held back"]
    for number, step in enumerate(made, 1):
        held = repr(step.held) if step.held else ""
        lines.append(f"{number:>4} {step.rows:>5}  {step.text!r:<14} {step.chance:>7.0%}  {held}".rstrip())
    rows = sum(step.rows for step in made)
    lines += ["", f"{rows} rows in all; with each token run once it would be {made[-1].rows}"]
    return "\n".join(lines)


def picture(made: list[Step]) -> str:
    """A square for each row that each step runs: light where an earlier step ran it already."""
    cell, first = 16, made[0].rows
    parts = ['<text x="10" y="16">each line is a step; dark: rows that no step before has run</text>']
    for number, step in enumerate(made):
        y = 28 + number * cell
        for row in range(step.rows):
            new = number == 0 or row >= first + number - 1
            parts.append(
                f'<rect class="{"new" if new else "again"}" x="{10 + row * cell}" y="{y}"'
                ' width="14" height="14"/>'
            )
        word = step.text.replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f'<text x="{18 + step.rows * cell}" y="{y + 12}">{word}</text>')
    width, height = 110 + made[-1].rows * cell, 40 + len(made) * cell
    style = (
        "svg{background:#fff}.new{fill:#e6862b}.again{fill:#f6d9bd}"
        "text{font:12px monospace;fill:#333;white-space:pre}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    made = list(steps())
    print(table(made))
    if arguments.svg:
        arguments.svg.write_text(picture(made), encoding="utf-8")


if __name__ == "__main__":
    main()
