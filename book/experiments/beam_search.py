"""Chapter 4.3: what wider searches find, and what their forks take. Prints two tables; --svg draws.

python book/experiments/beam_search.py [--mistakes] [--svg book/docs/img/beam_search.svg]
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import count
from math import exp, log
from statistics import mean
from typing import NamedTuple, cast

from by_mistakes import show, told_with

from tiny_llm import data
from tiny_llm.data import Advance
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.beam import BeamSearch
from tiny_llm.decoding.decide import Decision, Row
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import BeamParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.tokenizer.detokenizer import StreamDetokenizer

VOCAB, LENGTH, LANGUAGES, SIZE = 4, 6, 60, 16
SHOWN = (
    "tokens-shared",
    "counts-shared",
    "blocks-not-shared",
    "each-beam-its-best",
    "all-are-forks",
    "ends-take-places",
    "longer-is-more",
    "over-by-the-best",
)

Text = tuple[int, ...]
Language = Callable[[Text], dict[int, float]]
"""A text so far -> log-probabilities of what comes next, the likeliest first."""


def made_up(seed: int, vocab: int = VOCAB, order: int = LENGTH) -> Language:
    """A language in which what comes next depends on the last ``order`` tokens."""

    @cache
    def after(text: Text) -> dict[int, float]:
        chance = random.Random(f"{seed} {text}")
        weights = [chance.random() ** 3 + 1e-6 for _ in range(vocab)]
        told = {token: log(weight / sum(weights)) for token, weight in enumerate(weights)}
        return dict(sorted(told.items(), key=lambda one: -one[1]))

    return lambda text: after(text[-order:])


class Silent:
    """In the place of a detokenizer: no token has a text."""

    def push(self, token: int) -> str:
        """Nothing to show."""
        return ""

    def finish(self) -> str:
        """Nothing at the end."""
        return ""

    def copy(self) -> Silent:
        """It remembers nothing, so it is its own copy."""
        return self


def begun(sequence: data.Sequence, params: BeamParams, ends: Sequence[int]) -> BeamSearch:
    """A search for the answers to a sequence's prompt."""
    detokenizer = cast(StreamDetokenizer, Silent())
    return BeamSearch(Answer.begun(0, sequence.id, sequence, params, detokenizer, ends))


def said(beam: Answer, language: Language) -> Decision:
    """What a model says of a beam's next token, its penalty heeded."""
    likeliest = language(tuple(beam.token_ids))
    if beam.params.presence_penalty:
        likeliest = penalized(likeliest, beam.history.answer, beam.params.presence_penalty)
    told = dict(list(likeliest.items())[: beam.candidates])
    return Decision(Row(0, beam, len(beam.tokens)), 0, told, None)


def penalized(likeliest: dict[int, float], seen: Collection[int], penalty: float) -> dict[int, float]:
    """Log-probabilities when those of the tokens ``seen`` are less by ``penalty``, the likeliest first."""
    less = {token: p - penalty * (token in seen) for token, p in likeliest.items()}
    total = log(sum(map(exp, less.values())))
    return dict(sorted(((token, p - total) for token, p in less.items()), key=lambda one: -one[1]))


def searched(language: Language, params: BeamParams) -> tuple[float, int]:
    """The best answer's score, and how many rows of the model that took."""
    search, numbers, rows = begun(data.Sequence(0, array("i", [0]), params), params, ()), count(1), 0
    while True:
        for beam in search.beams:
            search.take(said(beam, language))
            rows += 1
        search.advance(numbers)
        if search.is_over:
            return search.answers()[0].score, rows


def likeliest(language: Language, text: Text = ()) -> float:
    """The log-probability of the likeliest text of all that go on from ``text``."""
    if len(text) == LENGTH:
        return 0.0
    return max(p + likeliest(language, (*text, token)) for token, p in language(text).items())


def width_table() -> str:
    """Widths against all texts of a tiny language."""
    languages = [made_up(seed) for seed in range(LANGUAGES)]
    best = [likeliest(language) for language in languages]
    lines = [
        f"{LANGUAGES} languages of {VOCAB} tokens, texts of {LENGTH}",
        "   width   rows   the likeliest is found   its share of that",
    ]
    for width in (1, 2, 3, 4, 5, 6, 8, 16):
        params = BeamParams(width=width, max_tokens=LENGTH, length_penalty=0.0)
        found, rows = zip(*(searched(language, params) for language in languages), strict=True)
        lost = [score - most for score, most in zip(found, best, strict=True)]
        share = sum(loss > -1e-9 for loss in lost) / LANGUAGES
        lines.append(f"{width:>8} {mean(rows):>6.0f} {share:>24.0%} {exp(mean(lost)):>19.3f}")
    rows_of_all = sum(VOCAB**length for length in range(LENGTH))
    lines.append(f"     all {rows_of_all:>6,} {1:>24.0%} {1:>19.3f}")
    return "\n".join(lines)


class Served:
    """Searches over a real scheduler and real blocks, and what every slot of the pool holds."""

    def __init__(self, blocks: int = 2000, size: int = SIZE) -> None:
        self.manager, self.size = BlockManager(size, blocks, prefix_cache=False), size
        self.scheduler = Scheduler(self.manager)
        self.slots: dict[tuple[int, int], Text] = {}
        self.numbers = count(1)
        self.read = self.wrong = self.most = self.copied = self.forks = self.tokens = 0

    def write(self, looks: bool) -> tuple[data.Plan, list[int]]:
        """A step's pass, and whose next tokens it tells. ``looks``: at what is read, too."""
        plan = self.scheduler.schedule()
        assert plan.items, "nothing is to be done, and the search is not over"
        for old, new in plan.copies:
            self.copied += 1
            for slot in range(self.size if looks else 0):
                self.slots[new, slot] = self.slots.get((old, slot), ())
        for item in plan.items if looks else ():
            sequence = self.scheduler.sequence(item.seq_id)
            assert sequence is not None
            text, end = tuple(sequence.tokens), item.start + len(item.tokens)
            for at in range(end):
                place = item.block_table[at // self.size], at % self.size
                if at >= item.start:
                    self.slots[place] = text[: at + 1]
                self.wrong += self.slots.get(place) != text[: at + 1]
            self.read += end
        self.most = max(self.most, self.manager.usage([]).used)
        return plan, [item.seq_id for item in plan.items if item.logit_rows]

    def search(
        self,
        prompt: Sequence[int],
        language: Language,
        params: BeamParams,
        ends: Sequence[int] = (),
        looks: bool = True,
    ) -> list[Answer]:
        """The answers of a search."""
        sequence = data.Sequence(next(self.numbers), array("i", prompt), params)
        self.scheduler.add(sequence)
        search = begun(sequence, params, ends)
        while True:
            plan, told = self.write(looks)
            beams = {beam.seq_id: beam for beam in search.beams}
            for seq_id in told:
                search.take(said(beams[seq_id], language))
            advances = search.advance(self.numbers)
            going_on = set() if search.is_over else {advance.seq_id for advance in advances}
            for seq_id in beams.keys() - going_on:
                self.scheduler.cancel(seq_id)
            if search.is_over:
                return search.answers()
            for advance in advances:
                self.forks += len(advance.forks)
                self.tokens += len(advance.forks) * len(beams[advance.seq_id].tokens)
            self.go_on(plan, told, advances, {beam.seq_id: beam for beam in search.beams})

    def go_on(
        self, plan: data.Plan, told: list[int], advances: list[Advance], beams: dict[int, Answer]
    ) -> None:
        """Let the scheduler fork; the beams' tokens are its sequences' from then on."""
        for sequence in self.scheduler.commit(plan, [Advance(seq_id, ()) for seq_id in told], advances):
            if sequence.id in beams:
                beams[sequence.id].tokens = sequence.tokens


def fork_table() -> str:
    """A prompt of 1,000 tokens, answers of 64: blocks of each alone, with forks, and what is copied."""
    lines = ["width   forks   blocks, each alone   with forks   blocks copied   if beams were copied"]
    for width in (1, 2, 4, 8):
        served = Served()
        params = BeamParams(width=width, max_tokens=64, length_penalty=0.0)
        served.search([0] * 1000, made_up(1, 8), params, looks=False)
        alone = width * served.manager.blocks_for(1063)
        copies = served.tokens // SIZE
        lines.append(
            f"{width:>5} {served.forks:>7} {alone:>20} {served.most:>12} {served.copied:>15} {copies:>22,}"
        )
    return "\n".join(lines)


def told() -> str:
    """Thirty searches over one pool, in a line: what is found, what was read, what is lost."""
    served, scores, off, end = Served(300, 4), list[float](), 0, ""
    params = BeamParams(width=4, max_tokens=8, length_penalty=1.0, presence_penalty=1.0)
    try:
        for number in range(30):
            language = made_up(number, 5)
            best, *_ = served.search([9] * (4 + number % 4), language, params, ends=(0,))
            text = tuple(best.token_ids)
            really = sum(
                penalized(language(text[:at]), text[:at], 1.0)[token] for at, token in enumerate(text)
            ) / max(1, len(text))
            scores.append(really)
            off += abs(really - best.score) > 1e-9
    except (AssertionError, LookupError, ValueError) as error:
        end = f"   {type(error).__name__} in search {len(scores) + 1}"
    lost = 0 if end else served.manager.usage([]).used
    score = f"{mean(scores):.3f}" if scores else "-"
    return f"{score:>7} {off:>6} {served.wrong / max(1, served.read):>6.1%} {lost:>5}{end}"


def mistakes() -> str:
    """The searches with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<20}  found    off  wrong  lost"]
    return "\n".join(lines + [f"{name:<20} {line}" for name, line in told_with(__file__, "4.3", SHOWN)])


WORDS: dict[str, dict[str, float]] = {
    "": {"The": 0.55, "A": 0.45},
    "The": {"cat": 0.4, "dog": 0.35, "old": 0.25},
    "A": {"cat": 0.3, "small": 0.7},
    "small": {"cat": 0.9, "dog": 0.1},
    "old": {"dog": 0.5, "cat": 0.5},
    "cat": {"sat": 0.45, "ate": 0.3, ".": 0.25},
    "dog": {"ate": 0.6, "sat": 0.4},
    "sat": {"down": 0.6, ".": 0.4},
    "ate": {".": 0.8, "it": 0.2},
    "down": {".": 1.0},
    "it": {".": 1.0},
    ".": {},
}
COLORS = ("#e6862b", "#4878a8", "#5a9e5a", "#b05a8f", "#8a7340")


class Drawn(NamedTuple):
    """A beam in the picture: its text, the sequence that it lives in, whether it is an end."""

    text: Text
    seq_id: int
    score: float
    ended: bool


def steps() -> Iterator[list[Drawn]]:
    """The search of the picture, step by step."""
    words = list(WORDS)

    def language(text: Text) -> dict[int, float]:
        row = WORDS[words[text[-1]] if text else ""]
        return {words.index(word): log(p) for word, p in sorted(row.items(), key=lambda one: -one[1])}

    params = BeamParams(width=3, n=3, max_tokens=9, length_penalty=1.0)
    search, numbers = begun(data.Sequence(0, array("i", [0]), params), params, (words.index("."),)), count(1)
    for length in count(1):
        for beam in search.beams:
            search.take(said(beam, language))
        search.advance(numbers)
        new = [one for one in search._found if len(one.token_ids) == length]
        row = [Drawn(tuple(beam.token_ids), beam.seq_id, beam.score, False) for beam in search.beams]
        yield row + [Drawn(tuple(one.token_ids), one.seq_id, one.score, True) for one in new]
        if search.is_over:
            return


def picture() -> str:
    """The search as a tree: a column a token, a colour a sequence, ended answers framed."""
    words, columns = list(WORDS), list(steps())
    places: dict[Text, tuple[int, int]] = {(): (28, 100)}
    parts = ['<circle cx="28" cy="100" r="5" fill="#333"/>', '<text x="8" y="124">prompt</text>']
    owner: dict[Text, int] = {}
    for column, row in enumerate(columns):
        for rank, one in enumerate(row):
            x, y = 84 + 112 * column, 30 + 58 * rank
            places[one.text] = (x, y)
            owner[one.text] = one.seq_id
    for text, (x, y) in places.items():
        if not text:
            continue
        old_x, old_y = places[text[:-1]]
        from_x = old_x + (72 if text[:-1] else 6)
        color = COLORS[owner[text] % len(COLORS)]
        own = owner[text] == owner.get(text[:-1], 0)
        dash = "" if own else ' stroke-dasharray="5 3"'
        parts.append(f'<path d="M{from_x} {old_y}L{x} {y}" stroke="{color}"{dash}/>')
    for row in columns:
        for one in row:
            x, y = places[one.text]
            color = COLORS[one.seq_id % len(COLORS)]
            fill = "#fff" if one.ended else color
            parts.append(
                f'<rect x="{x}" y="{y - 16}" width="72" height="32" rx="4" fill="{fill}" stroke="{color}"/>'
            )
            word = "end" if words[one.text[-1]] == "." else words[one.text[-1]]
            parts.append(f'<text class="{"e" if one.ended else "w"}" x="{x + 8}" y="{y - 2}">{word}</text>')
            parts.append(
                f'<text class="{"e" if one.ended else "w"} n" x="{x + 8}" y="{y + 11}">{one.score:.2f}</text>'
            )
    style = "svg{background:#fff}text{font:13px monospace;fill:#333}.n{font-size:11px}.w{fill:#fff}"
    style += "path{fill:none;stroke-width:2.5}rect{stroke-width:2}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 240">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    show(__doc__, lambda: f"{width_table()}\n\n{fork_table()}", picture, mistakes, told)


if __name__ == "__main__":
    main()
