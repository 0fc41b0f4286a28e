"""Chapter 4.4: what a mask costs, in bytes that are looked at. Prints a table; --svg draws.

python book/experiments/forms.py [--times] [--mistakes] [--svg book/docs/img/forms.svg]
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
from by_mistakes import told_with
from command_line import parser_of

from book.course.manifest import ROOT
from tiny_llm.decoding.grammar import regex_grammar
from tiny_llm.decoding.regex import State, after, constraint_ref, mask_ref, opened, parsed
from tiny_llm.decoding.structured_output import GrammarCompiler
from tiny_llm.sampling.allowed import keep_allowed
from tiny_llm.tokenizer.tokenizer import Tokenizer

PRICE = r"[0-9]+\.[0-9][0-9]"
PATTERNS = (
    PRICE,
    "yes|no|maybe",
    r"[0-9]+(, [0-9]+)*",
    r"[A-Z][a-z]*( [A-Z][a-z]*)*",
    r'"([ -!#-\[\]-~]|\\")*"',
)
SHOWN = (
    "first-byte-only",
    "empty-ones-too",
    "ends-anywhere",
    "ends-when-it-can",
    "plus-is-star",
    "star-once",
    "star-never-passed",
)


class Node(NamedTuple):
    """Tokens that begin alike: how many, and those behind each next byte."""

    tokens: list[int]
    behind: dict[int, Node]


def tree_of(vocabulary: Sequence[bytes]) -> Node:
    """All tokens in a tree, a byte a branch."""
    root = Node([0], {})
    for token in vocabulary:
        node = root
        for byte in token:
            node = node.behind.setdefault(byte, Node([0], {}))
            node.tokens[0] += 1
    return root


def looks(state: State, node: Node) -> tuple[int, int]:
    """How many bytes are looked at for a mask: token by token, and each branch once."""
    single = shared = 0
    for byte, behind in node.behind.items():
        single, shared = single + behind.tokens[0], shared + 1
        if left := after(state, bytes([byte])):
            more = looks(left, behind)
            single, shared = single + more[0], shared + more[1]
    return single, shared


def states_of(pattern: str) -> list[State]:
    """All places that a text can come to."""
    found = [opened([parsed(pattern)])]
    for state in found:
        for byte in range(256):
            if (left := after(state, bytes([byte]))) and left not in found:
                found.append(left)
    return found


def bundled() -> tuple[Tokenizer, list[bytes], int]:
    """The bundled model's tokenizer, the bytes of its tokens, and the one that ends an answer."""
    tokenizer = Tokenizer.from_folder(ROOT / "tiny_llm" / "demo")
    marks = set(tokenizer.marks())
    vocabulary = [b"" if i in marks else token for i, token in enumerate(tokenizer.vocabulary())]
    return tokenizer, vocabulary, tokenizer.encode("<|im_end|>", add_special_tokens=False)[0]


def table() -> Iterator[str]:
    """For each pattern its states, and what is looked at for a mask, on average over them."""
    _, vocabulary, end = bundled()
    tree = tree_of(vocabulary)
    yield f"{len(vocabulary):,} tokens of {sum(map(len, vocabulary)):,} bytes"
    yield ""
    yield "pattern                       states  allowed  token by token  in a tree"
    for pattern in PATTERNS:
        states = states_of(pattern)
        single, shared = (
            sum(one) / len(states) for one in zip(*(looks(s, tree) for s in states), strict=True)
        )
        allowed = sum(sum(map(bool, mask_ref(s, vocabulary, [end]))) for s in states) / len(states)
        yield f"{pattern:<30} {len(states):>5} {allowed:>8.0f} {single:>15,.0f} {shared:>10,.0f}"


def milliseconds(work: Callable[[], object]) -> float:
    """The shortest of five."""
    spans = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        spans.append(time.perf_counter() - begin)
    return 1e3 * min(spans)


def times() -> Iterator[str]:
    """What a mask takes by hand, kept, and by the library; and to heed masks of a large vocabulary."""
    tokenizer, vocabulary, end = bundled()
    compiler = GrammarCompiler(tokenizer, len(vocabulary), [end])
    yield "pattern                       by hand     kept  library, ms a mask"
    for pattern in PATTERNS:
        start = opened([parsed(pattern)])
        kept = constraint_ref(pattern, vocabulary, [end])()
        kept([])
        make = compiler.compile(regex_grammar(pattern))
        places = iter([make() for _ in range(5)])
        spans = (
            milliseconds(lambda start=start: mask_ref(start, vocabulary, [end])),  # type: ignore[misc]
            milliseconds(lambda kept=kept: kept([])),  # type: ignore[misc]
            milliseconds(lambda places=places: next(places)([])),  # type: ignore[misc]
        )
        yield f"{pattern:<30}" + "".join(f"{span:>8.3f}" for span in spans)
    for rows in (1, 16):
        logits, mask = mx.zeros((rows, 151_936), mx.bfloat16), bytes(151_936)
        span = milliseconds(
            lambda logits=logits, mask=mask: mx.eval(keep_allowed(logits, [mask] * len(logits)))
        )  # type: ignore[misc]
        yield f"{rows} rows of 151,936: {span:.3f} ms"


WORDS = "10 12 99 00 0. .5 .50 .99 5. 1.5 . EU EUR UR US USD SD  E  U yes no a e 1a 2b .x 5 E .5 E 00 U"
TOKENS = [
    *(bytes([byte]) for byte in range(32, 127)),
    *(word.encode() for word in WORDS.split(" ")),
    b"",
    b"",
]
MONEY = r"[0-9]+(\.[0-9][0-9])?( (EUR|USD))?"


def story() -> str:
    """A hundred answers of a model that likes anything, in a line: those that match, and those cut off."""
    end, wrong, cut, length = len(TOKENS) - 1, list[str](), 0, 0
    form = constraint_ref(MONEY, TOKENS, [end])()
    for number in range(100):
        chance, tokens = random.Random(number), list[int]()
        while len(tokens) < 30 and end not in tokens:
            logits = mx.array([[chance.gauss(0, 1) for _ in TOKENS]])
            tokens.append(int(mx.argmax(keep_allowed(logits, [form(tokens)])).item()))
        text = b"".join(TOKENS[token] for token in tokens).decode()
        length += len(tokens)
        if end not in tokens:
            cut += 1
        elif not re.fullmatch(MONEY, text):
            wrong.append(text)
    told = f"{100 - len(wrong) - cut:>5} {len(wrong):>7} {cut:>8} {length / 100:>7.1f}"
    return f"{told}   {wrong[0]}" if wrong else told


def mistakes() -> Iterator[str]:
    """The story with mistakes of this chapter, each in a process of its own."""
    yield "mistake             match  do not  cut off  tokens   one that does not"
    for name, told in told_with(__file__, "4.4", SHOWN):
        yield f"{name:<19} {told}"


DRAWN = ("7", "12", ".", ".5", "5.", ".505", "a", "(end)")
LABELS = ("0-9", ".", "0-9", "0-9")


def picture() -> str:
    """The states of a price, and at each the tokens that may come next."""
    tokens = [b"" if word == "(end)" else word.encode() for word in DRAWN]
    states = states_of(PRICE)
    parts = [f'<text x="20" y="24">{PRICE}</text>']
    for number, state in enumerate(states):
        x = 70 + 155 * number
        ring = ' stroke-width="3"' if () in state else ""
        parts.append(f'<circle cx="{x}" cy="80" r="20" fill="#f3c795"{ring}/>')
        parts.append(f'<text x="{x - 4}" y="85">{number}</text>')
        if number < len(LABELS):
            parts.append(f'<path d="M{x + 22} 80h106m-6 -5l6 5l-6 5"/>')
            parts.append(f'<text x="{x + 62}" y="72">{LABELS[number]}</text>')
        mask = mask_ref(state, tokens, [len(tokens) - 1])
        for row, (word, allowed) in enumerate(zip(DRAWN, mask, strict=True)):
            fill = "#b5d8b0" if allowed else "#eee"
            parts.append(
                f'<rect x="{x - 36}" y="{124 + 26 * row}" width="72" height="22" rx="3" fill="{fill}"/>'
            )
            style = "" if allowed else ' class="n"'
            parts.append(f'<text{style} x="{x - 28}" y="{140 + 26 * row}">{word}</text>')
    parts.append('<path d="M210 62c-20 -38 50 -38 30 0m-7 -5l7 5l3 -9"/><text x="212" y="28">0-9</text>')
    style = "svg{background:#fff}text{font:14px monospace;fill:#333}.n{fill:#bbb}path{stroke:#555;fill:none}"
    style += "circle{stroke:#555}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 340">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print, and draw."""
    parser = parser_of(__doc__)
    for name in ("times", "mistakes", "story"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    if arguments.story:
        print(story())
    else:
        print("\n".join(mistakes() if arguments.mistakes else times() if arguments.times else table()))
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
