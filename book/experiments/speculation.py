"""Chapter 2.11: acceptance predicted, then measured; how long drafts should be. Prints tables; --svg draws.

python book/experiments/speculation.py [--mistakes] [--svg book/docs/img/speculation.svg]
"""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple, cast

from by_mistakes import show, told_with

from book.course.manifest import ROOT
from tiny_llm.data import Sequence, StepCosts
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.decide import Decision, Row, _guessed_right
from tiny_llm.decoding.ngram import ngram_draft
from tiny_llm.scheduler.drafts import Acceptance, Worth
from tiny_llm.scheduler.speed import StepTime

LENGTHS = (1, 2, 4, 8)
SHOWN = (
    "all-are-kept",
    "first-guess-compared",
    "by-token-alone",
    "latest-whatever-agrees",
    "behind-the-place",
    "all-wrong",
)


def words_of(text: str) -> list[int]:
    """A text's words and marks as numbers."""
    known: dict[str, int] = {}
    return [known.setdefault(word, len(known)) for word in re.findall(r"\w+|[^\w\s]|\n", text)]


def records() -> str:
    """A list of forty records, as a tool might return it."""
    chance = random.Random(0)
    lines = []
    for number in range(40):
        price, left = chance.randint(1, 99), chance.choice(("true", "false"))
        lines.append(f'{{"id": {number}, "name": "item {number}", "price": {price}, "in_stock": {left}}},')
    return "\n".join(lines)


def edited() -> str:
    """A text, and then the same with every twentieth word another one: somebody asked for a correction."""
    words = re.findall(r"\S+", (ROOT / "LICENSE").read_text(encoding="utf-8"))[:600]
    changed = [f"changed{at}" if at % 20 == 7 else word for at, word in enumerate(words)]
    return " ".join([*words, *changed])


TEXTS: Mapping[str, tuple[str, float]] = {
    "a licence": ((ROOT / "LICENSE").read_text(encoding="utf-8"), 0.2),
    "forty records": (records(), 0.1),
    "a text corrected": (edited(), 0.5),
}
"""Texts, and what share of each is the prompt."""


class Told(NamedTuple):
    """What guessing brought: tokens, steps, steps with a draft, guesses looked at and right, words wrong."""

    tokens: int
    steps: int
    drafts: int
    checked: int
    right: int
    wrong: int
    believed: float


def told(text: str, prompt: float, most: int) -> Told:
    """Let a text be the answer that a model gives, with drafts of ``most`` tokens beside it."""
    words = words_of(text)
    seq = Sequence(0, array("i", words[: int(prompt * len(words))]))
    known, tokens, steps, drafts, checked, right = Acceptance(), 0, 0, 0, 0, 0
    answer = cast(Answer, SimpleNamespace(prompt_len=seq.prompt_len))
    while len(seq.tokens) < len(words) - most:
        at = len(seq.tokens)
        draft = ngram_draft(seq, most)
        kept = list[Decision]()
        for count in range(len(draft) + 1):  # as in a step: a row draws behind each guess
            row = Row(count, answer, at + count, draft[:count])
            is_true = draft[:count].tolist() == words[at : at + count]
            drawn = (
                words[at + count] if is_true else draft[count - 1] + 1
            )  # behind a wrong word, something else
            if _guessed_right(kept, row):
                kept.append(Decision(row, drawn, None, None))
        accepted = len(kept) - 1
        known.observe(len(draft), accepted)
        seq.tokens.extend(one.token for one in kept)
        tokens, steps, drafts = tokens + len(kept), steps + 1, drafts + (len(draft) > 0)
        checked, right = checked + min(accepted + 1, len(draft)), right + accepted
    wrong = sum(a != b for a, b in zip(seq.tokens, words, strict=False))
    return Told(tokens, steps, drafts, checked, right, wrong, known.share)


def expected(share: float, most: int) -> float:
    """Tokens of a step with a draft of ``most``, of which each is right with a chance of ``share``."""
    return sum(share**count for count in range(most + 1))


def measured(share: float, most: int, steps: int = 4000) -> float:
    """The same by throwing dice."""
    chance, tokens = random.Random(most), 0
    for _ in range(steps):
        tokens += 1
        for _ in range(most):
            if chance.random() >= share:
                break
            tokens += 1
    return tokens / steps


def table() -> str:
    """Texts with drafts of two lengths: tokens a step, foretold by the share that is right, and counted."""
    lines = ["answer             draft   with a draft   right   foretold   counted"]
    for name, (text, prompt) in TEXTS.items():
        for most in (2, 8):
            one = told(text, prompt, most)
            share, with_draft = one.right / max(1, one.checked), one.drafts / one.steps
            foretold = 1 + with_draft * (expected(share, most) - 1)
            counted = one.tokens / one.steps
            lines.append(
                f"{name:<18} {most:>5} {with_draft:>14.0%} {share:>7.0%} {foretold:>10.2f} {counted:>9.2f}"
            )
    lines += ["", "sequences at once     1     4    16    64   256"]
    for share in (0.4, 0.6, 0.9):
        found = []
        for decodes in (1, 4, 16, 64, 256):
            speed = StepTime(StepCosts(20.0, 0.5, 0.0, 0.5, 0.0))
            speed._doubts = [[0.0] * 5 for _ in range(5)]  # its costs are known
            found.append(Worth(speed, decodes, 0).length(share, 16))
        lines.append(f"guesses, {share:.0%} right" + "".join(f"{count:>6}" for count in found))
    return "\n".join(lines)


def story() -> str:
    """All texts with drafts of eight: words that are wrong, tokens a step, what is believed of guesses."""
    all_of_them = [told(text, prompt, 8) for text, prompt in TEXTS.values()]
    wrong, tokens = sum(one.wrong for one in all_of_them), sum(one.tokens for one in all_of_them)
    believed = sum(one.believed for one in all_of_them) / len(all_of_them)
    return f"{wrong / tokens:>6.0%} {tokens / sum(one.steps for one in all_of_them):>15.2f} {believed:>9.0%}"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<26}  wrong   tokens a step   believed"]
    for name, told in told_with(__file__, "2.11", SHOWN):
        lines.append(f"{name:<26} {told}")
    return "\n".join(lines)


def picture() -> str:
    """Tokens a step against the length of a draft, foretold (lines) and by dice (dots)."""
    style = "<style>text{font:12px monospace;fill:#333}</style>"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300">',
        f'{style}<rect width="760" height="300" fill="#fff"/>',
    ]
    left, bottom, wide, high = 60, 256, 40, 26
    for tokens in range(1, 9):
        y = bottom - high * tokens
        parts.append(f'<text x="30" y="{y + 4}">{tokens}</text>')
        parts.append(f'<path d="M{left} {y}H{left + 16 * wide}" stroke="#ddd"/>')
    colors = ((0.95, "#c9534a"), (0.9, "#e6862b"), (0.8, "#5a9e5a"), (0.6, "#4878a8"), (0.3, "#8a5aa8"))
    for share, color in colors:
        points = [(left + wide * most, bottom - high * expected(share, most)) for most in range(17)]
        shown = [(x, y) for x, y in points if y > 20]
        path = "L".join(f"{x} {y:.1f}" for x, y in shown)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for most in range(1, 17):
            y = bottom - high * measured(share, most)
            if y > 20:
                parts.append(f'<circle cx="{left + wide * most}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
        x, y = shown[-1]
        parts.append(f'<text x="{x + 8}" y="{y + 4:.1f}" style="fill:{color}">{share:.0%}</text>')
    parts += [
        f'<text x="{left + wide * most - 4}" y="{bottom + 16}">{most}</text>' for most in range(0, 17, 2)
    ]
    below = "guesses in a draft; upwards: tokens a step, by the share that is right"
    parts.append(f'<text x="{left}" y="{bottom + 36}">{below}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    show(__doc__, table, picture, mistakes, story)


if __name__ == "__main__":
    main()
