"""Chapter 0.1: what merges bring, and what padding costs. Prints two tables; --svg draws.

python book/experiments/bpe.py [--svg book/docs/img/bpe.svg]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from command_line import parser_of

from tiny_llm.tokenizer.bpe import BPE, train
from tiny_llm.tokenizer.detokenizer import byte_alphabet

ROOT = Path(__file__).resolve().parents[2]
SIZES = (256, 300, 400, 600, 800)
LINE = "Unless required by applicable law"
LENGTHS = (10, 50, 500, 1000)


def learnt() -> list[BPE]:
    """Tokenizers of each size, trained on this project's licence."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    split = BPE.from_json((ROOT / "tiny_llm" / "demo" / "tokenizer.json").read_text(encoding="utf-8")).split
    merges = train(Counter(split(text)), max(SIZES))
    made = []
    for size in SIZES:
        kept = merges[: size - 256]
        tokens = [*sorted(byte_alphabet()), *("".join(pair) for pair in kept)]
        vocab = {token: number for number, token in enumerate(tokens)}
        made.append(BPE(vocab, {pair: rank for rank, pair in enumerate(kept)}, {}, split))
    return made


def size_table(made: Sequence[BPE]) -> str:
    """Bytes a token on the text of training and on another one."""
    texts = {
        "the licence": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        "Grüße aus Köln, 你好": "Grüße aus Köln, 你好",
    }
    lines = [f"tokens known   bytes a token of {'   '.join(texts)}   the newest token"]
    for bpe in made:
        shares = [len(text.encode()) / len(bpe.encode(text)) for text in texts.values()]
        newest = repr(bpe.decode([len(bpe.vocab) - 1])) if bpe.ranks else "(bytes alone)"
        lines.append(f"{len(bpe.vocab):>12} {shares[0]:>27.2f} {shares[1]:>20.2f}   {newest}")
    return "\n".join(lines)


def padding_table() -> str:
    """Places computed, used and wasted, for four requests in padded batches."""
    lines = ["padded batches             places    used   wasted"]
    for batches in (
        [LENGTHS],
        [LENGTHS[:1], LENGTHS[1:]],
        [LENGTHS[:2], LENGTHS[2:]],
        [LENGTHS[:3], LENGTHS[3:]],
    ):
        places = sum(len(batch) * max(batch) for batch in batches)
        name = " + ".join("(" + ", ".join(map(str, batch)) + ")" for batch in batches)
        lines.append(f"{name:<26} {places:>6,} {sum(LENGTHS):>7,} {1 - sum(LENGTHS) / places:>8.0%}")
    lines.append(f"{'none: one after the other':<26} {sum(LENGTHS):>6,} {sum(LENGTHS):>7,} {0:>8.0%}")
    return "\n".join(lines)


def picture(made: Sequence[BPE]) -> str:
    """One line of the licence, cut by each tokenizer, as an SVG."""
    wide, parts = 19, list[str]()
    for row, bpe in enumerate(made):
        y, x = 30 + 34 * row, 130
        ids = bpe.encode(LINE)
        parts.append(f'<text x="8" y="{y + 17}">{len(bpe.vocab)}: {len(ids)} tokens</text>')
        for token in ids:
            text = bpe.decode([token])
            parts.append(f'<rect x="{x}" y="{y}" width="{wide * len(text) - 3}" height="26"/>')
            for at, letter in enumerate(text):
                shown = escape(letter if letter != " " else "·")
                parts.append(f'<text class="letter" x="{x + wide * at + 8}" y="{y + 18}">{shown}</text>')
            x += wide * len(text)
    style = (
        "svg{background:#fff}rect{fill:#fbe6cd;stroke:#e6862b}text{font:12px monospace;fill:#333}"
        ".letter{font-size:15px;text-anchor:middle}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 775 214"><style>{style}</style>'
    title = '<text x="8" y="16">tokens known, and how they cut a line of what they were learnt from</text>'
    return "\n".join([head, title, *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    arguments = parser_of(__doc__).parse_args()
    made = learnt()
    print(size_table(made), padding_table(), sep="\n\n")
    if arguments.svg:
        arguments.svg.write_text(picture(made), encoding="utf-8")


if __name__ == "__main__":
    main()
