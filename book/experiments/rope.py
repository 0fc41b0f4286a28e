"""Chapter 1.2: what the bundled model recalls when positions are not what they should be. --svg draws.

python book/experiments/rope.py [--svg book/docs/img/rope.svg]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import cos, sin, tau
from pathlib import Path

import mlx.core as mx
from command_line import parser_of

from tiny_llm.data import Batch
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.loading import load_model
from tiny_llm.ops.rope import rope_frequencies
from tiny_llm.tokenizer.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "tiny_llm" / "demo"
COLORS, THINGS = ("red", "green", "blue", "black", "white"), ("door", "box", "room", "gate")
WORDS = ("zimbro", "lurtis", "belkan", "tormiv")
Move = Callable[[int, int], int]
"""(a token's place, the prompt's length) -> its position."""
MOVES: Mapping[str, Move] = {
    "as they are": lambda place, length: place,
    "all 500 later": lambda place, length: place + 500,
    "the answer 100 later": lambda place, length: place + 100 * (place >= length),
    "the answer 10 earlier": lambda place, length: place - 10 * (place >= length),
    "the answer 30 earlier": lambda place, length: place - 30 * (place >= length),
    "the answer at one position": lambda place, length: min(place, length),
    "1.1 times as far apart": lambda place, length: place * 11 // 10,
    "twice as far apart": lambda place, length: 2 * place,
    "all at 0": lambda place, length: 0,
    "backwards": lambda place, length: -place,
}


@dataclass(frozen=True)
class Case:
    """A conversation as ids: what was asked, and the right answer, whose last tokens are the password."""

    prompt: Sequence[int]
    answer: Sequence[int]
    password: int


def cases(tokenizer: Tokenizer) -> list[Case]:
    """Twenty conversations with another fact between statement and question."""
    found = []
    for number, (color, thing) in enumerate(product(COLORS, THINGS)):
        word, sentence = WORDS[number % len(WORDS)], f"The password of the {color} {thing} is"
        chat = [
            {"role": "user", "content": f"{sentence} {word}."},
            {"role": "assistant", "content": "I will remember that."},
            {"role": "user", "content": "My dog is called Mosti."},
            {"role": "assistant", "content": "Noted."},
            {"role": "user", "content": f"What is the password of the {color} {thing}?"},
        ]
        prompt = tokenizer.encode(tokenizer.render_chat(chat), add_special_tokens=False)
        begun = tokenizer.encode(sentence, add_special_tokens=False)
        answer = tokenizer.encode(f"{sentence} {word}", add_special_tokens=False)
        found.append(Case(prompt, answer, len(answer) - len(begun)))
    return found


def batch_of(those: Sequence[Case], move: Move) -> Batch:
    """All conversations with their answers side by side, none of them padded."""
    starts = [0, *accumulate(len(c.prompt) + len(c.answer) for c in those)]
    positions = [move(p, len(c.prompt)) for c in those for p in range(len(c.prompt) + len(c.answer))]
    wanted = [
        end - 1 - back for c, end in zip(those, starts[1:], strict=True) for back in range(c.password, 0, -1)
    ]
    tokens = [token for c in those for token in (*c.prompt, *c.answer)]
    return Batch(mx.array(tokens), mx.array(positions, mx.int32), tuple(starts), mx.array(wanted))


def table() -> str:
    """For each way to number the tokens: how many passwords the model would write."""
    tokenizer, model = Tokenizer.from_folder(DEMO), load_model(DEMO, dtype="float32")
    those = cases(tokenizer)
    right = [token for c in those for token in c.answer[-c.password :]]
    lines = [f"{'positions':<26} right, of {len(those)}", ""]
    for name, move in MOVES.items():
        logits = model(batch_of(those, move), NoCache())
        hits = [a == b for a, b in zip(mx.argmax(logits, axis=-1).tolist(), right, strict=True)]
        ends = list(accumulate(c.password for c in those))
        whole = sum(all(hits[end - c.password : end]) for c, end in zip(those, ends, strict=True))
        lines.append(f"{name:<26} {whole:>6}")
    return "\n".join(lines)


def picture() -> str:
    """Dials: how far three pairs of a head of 64 have turned at positions 0 to 4."""
    frequencies = rope_frequencies(64, 10_000.0).tolist()
    parts = [
        '<text x="10" y="18">a query (dark), and a key three tokens back, each turned by its position</text>'
    ]
    for row, pair in enumerate((0, 6, 16)):
        y = 80 + row * 110
        frequency = frequencies[pair]
        parts.append(
            f'<text x="10" y="{y - 8}">pair {pair}</text><text x="10" y="{y + 8}">{frequency:.4f} rad</text>'
        )
        parts.append(f'<text x="10" y="{y + 24}">a token</text>')
        for column, position in enumerate((3, 4, 5, 9, 13)):
            x = 150 + column * 120
            parts.append(f'<circle cx="{x}" cy="{y}" r="38"/>')
            for at, kind in ((position - 3, "key"), (position, "query")):
                angle = (at * frequency) % tau
                parts.append(
                    f'<path class="{kind}" d="M{x} {y}L{x + 36 * cos(angle):.1f} {y - 36 * sin(angle):.1f}"/>'
                )
            if row == 2:
                parts.append(
                    f'<text class="middle" x="{x}" y="{y + 58}">{position - 3} and {position}</text>'
                )
    style = (
        "svg{background:#fff}circle{fill:#fdf3e7;stroke:#ddd}path{stroke-width:4;stroke-linecap:round}"
        ".key{stroke:#e6862b}.query{stroke:#333}text{font:12px monospace}.middle{text-anchor:middle}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 370"><style>{style}</style>'
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    print(table())
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
