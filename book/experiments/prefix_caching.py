"""Chapter 4.1: how much a prefix cache finds, foretold and then measured. Prints tables; --svg draws.

python book/experiments/prefix_caching.py [--trace FILE] [--mistakes] [--svg book/docs/img/prefix_caching.svg]

--trace takes Mooncake's traces (Qin et al. 2025): FAST25-release/traces of github.com/kvcache-ai/Mooncake.
"""

from __future__ import annotations

import json
import random
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heapreplace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from by_mistakes import told_with
from command_line import parser_of

from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.kv.prefix import chain, encode, root

SHOWN = (
    "tokens-alone",
    "names-trusted",
    "tokens-alone + names-trusted",
    "never-revived",
    "two-of-a-kind",
    "full-one-token-late",
    "names-what-is-asked",
)
MINUTES = (1, 2, 5, 10)


class Prompt(NamedTuple):
    """When it came, and its blocks by number: equal numbers, equal tokens from the very beginning."""

    at: float
    blocks: tuple[int, ...]


class Load:
    """Prompts in order of time, and the gaps: seconds between two uses of a block, the shortest first."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.total = sum(len(prompt.blocks) for prompt in prompts)
        self.seconds = prompts[-1].at - prompts[0].at
        last, gaps = dict[int, float](), list[float]()
        for at, blocks in prompts:
            gaps += [at - last[block] for block in blocks if block in last]
            last |= dict.fromkeys(blocks, at)
        self.gaps, self.distinct = sorted(gaps), len(last)

    def told(self) -> Iterator[str]:
        """What one needs to know to foretell."""
        yield f"{len(self.prompts):,} prompts in {self.seconds / 60:.0f} minutes: {self.total:,} blocks,"
        yield f"of which {self.distinct:,} are different"
        within = [bisect_right(self.gaps, 60 * minutes) / len(self.gaps) for minutes in MINUTES]
        shares = ", ".join(f"{share:.0%} of {m}" for share, m in zip(within, MINUTES, strict=True))
        yield f"used again within minutes: {shares}"

    def foretold(self, room: int) -> tuple[float, float]:
        """The share found with ``room`` blocks, and how many seconds a block lives that nobody asks for.

        Source: Denning 1968: in t seconds so many different blocks are used as are missed by who keeps
        each for t. LRU forgets what was used before the last ``room`` different ones.
        """
        rate, used, found = self.total / self.seconds, 0.0, 0
        for shorter, gap in pairwise([0.0, *self.gaps, self.seconds]):
            missed = rate * (1 - found / self.total)  # a second
            if used + missed * (gap - shorter) >= room:
                return found / self.total, shorter + (room - used) / missed
            used += missed * (gap - shorter)
            found = min(found + 1, len(self.gaps))
        return found / self.total, self.seconds

    def measured(self, room: int) -> float:
        """The share that a BlockManager finds; a number stands for the tokens of its block."""
        manager, found = BlockManager(1, room), 0
        for _, blocks in self.prompts:
            table, tokens = manager.table(), (*blocks, -1)  # the last token is computed anyway
            found += manager.allocate(table, tokens) or 0
            manager.register(table, tokens, len(blocks))
            manager.free(table, tokens, len(blocks))
        return found / self.total


def made_up() -> Load:
    """An hour of 250 people who ask about texts of theirs again and again, some after a long pause."""
    chance = random.Random(1)
    fresh = iter(range(1, 10**9))
    people: list[tuple[float, int, tuple[int, ...]]] = [
        (chance.uniform(0, 120), number, (0,)) for number in range(250)
    ]
    heapify(people)
    prompts = []
    while people[0][0] < 3600:
        at, number, blocks = people[0]
        if len(blocks) > 20:  # the context is full: another text
            blocks = (0,)
        blocks += tuple(next(fresh) for _ in range(chance.randint(1, 3) if len(blocks) > 1 else 6))
        prompts.append(Prompt(at, blocks))
        heapreplace(people, (at + chance.expovariate(1 / chance.choice((60, 120, 900))), number, blocks))
    return Load(prompts)


def trace(path: Path) -> Load:
    """Mooncake's: a line of JSON a prompt, with a number for each 512 tokens."""
    if not path.is_file():
        where = "FAST25-release/traces of github.com/kvcache-ai/Mooncake"
        sys.exit(f"There is no trace {path}. Mooncake's are in {where}.")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Load([Prompt(row["timestamp"] / 1e3, tuple(row["hash_ids"])) for row in rows])


def table(load: Load, rooms: Iterable[int]) -> Iterator[str]:
    """For each size of the cache what is found, foretold and measured."""
    yield from load.told()
    yield ""
    yield "   room   a block lives   foretold   found"
    for room in rooms:
        share, seconds = load.foretold(room)
        lives = f"{seconds:,.0f} s" if room < load.distinct else "for ever"
        yield f"{room:>7,} {lives:>15} {share:>10.1%} {load.measured(room):>7.1%}"


class Talk(NamedTuple):
    """A prompt that is being computed: whose, and where."""

    table: BlockTable
    key: str
    tokens: list[int]


class Story:
    """Six people in turns, some with the same words, and what every slot of the pool really holds."""

    SIZE, ROOM, CHUNK = 4, 90, 6

    def __init__(self) -> None:
        self.manager = BlockManager(self.SIZE, self.ROOM)
        self.slots: dict[tuple[int, int], tuple[object, ...]] = {}
        self.running: list[tuple[Talk, int]] = []
        self.read = self.asked = self.found = self.wrong = self.held = 0

    def begin(self, talk: Talk) -> None:
        """Take what is found of a prompt."""
        known = self.manager.allocate(talk.table, talk.tokens)
        assert known is not None, "no room"
        for old, new in self.manager.drain().copies:
            self.slots |= {(new, slot): self.slots.get((old, slot), ()) for slot in range(self.SIZE)}
        self.asked, self.found = self.asked + len(talk.tokens), self.found + known
        self.running.append((talk, known))

    def compute(self, talk: Talk, done: int) -> int:
        """A pass: read what is there, compute some tokens more; return how many there are then."""
        places = [(talk.table.blocks[at // self.SIZE], at % self.SIZE) for at in range(len(talk.tokens))]
        holds = [(talk.key, *talk.tokens[: at + 1]) for at in range(len(talk.tokens))]
        self.read += done
        self.wrong += sum(self.slots.get(places[at]) != holds[at] for at in range(done))
        end = min(done + self.CHUNK, len(talk.tokens))
        self.slots |= dict(zip(places[done:end], holds[done:end], strict=True))
        self.manager.register(talk.table, talk.tokens, end)
        return end

    def told(self) -> str:
        """A hundred passes, with a prompt or two that begin in each, in a line."""
        chance, end = random.Random(2), ""
        texts = {(key, n): [9] * 4 + [n] * 6 for key in ("", "a key") for n in (1, 2, 3)}
        try:
            for number in range(100):
                for key, who in [chance.choice([*texts])] * (1 + number % 2):
                    texts[key, who] += [chance.randrange(2) for _ in range(chance.randint(1, 16))]
                    texts[key, who] = texts[key, who][:10] if number % 15 == 14 else texts[key, who][:60]
                    self.begin(Talk(self.manager.table(key), key, texts[key, who].copy()))
                self.running = [(talk, self.compute(talk, done)) for talk, done in self.running]
                self.held = max(self.held, self.manager.usage([]).used)
                while len(self.running) > 4:
                    talk, done = self.running.pop(0)
                    self.manager.free(talk.table, talk.tokens, done)
        except (AssertionError, LookupError, ValueError) as error:
            end = f"   {type(error).__name__} in pass {number + 1}"
        found, wrong = self.found / self.asked, self.wrong / max(1, self.read)
        return f"{found:>6.1%} {wrong:>6.1%} {self.held:>6}{end}"


def mistakes() -> Iterator[str]:
    """The story with mistakes of this chapter, each in a process of its own."""
    yield f"{'mistake':<29} found  wrong   used"
    for name, told in told_with(__file__, "4.1", SHOWN):
        yield f"{name:<28} {told}"


DRAWN = (
    ("", "You are a helpful", "bot . Tell me", "what cats eat ?"),
    ("", "You are a helpful", "bot . Tell me", "what owls eat ?"),
    ("", "You are a rude", "bot . Tell me", "what cats eat ?"),
    ("a key", "You are a helpful", "bot . Tell me", "what cats eat ?"),
)
COLORS = (
    *("#f3c795", "#a9c8e6", "#b5d8b0", "#e2b6d3", "#d9cb9a"),
    *("#a8d5d5", "#eeb3ae", "#c9c3ea", "#e8e0a0", "#c4c4c4"),
)


def picture() -> str:
    """Four prompts as chains of blocks: the same name, the same colour."""
    words = [word for _, *blocks in DRAWN for block in blocks for word in block.split()]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    color: dict[bytes, str] = {}
    parts = ['<text class="n" x="20" y="20">salt</text>']
    for row, (salt, *blocks) in enumerate(DRAWN):
        name, top = root(salt), 34 + 64 * row
        parts.append(f'<text x="20" y="{top + 20}">{f"“{salt}”" if salt else "none"}</text>')
        parts.append(f'<text class="n" x="20" y="{top + 38}">{name.hex()[:6]}</text>')
        for column, block in enumerate(blocks):
            name, left = chain(name, encode([ids[word] for word in block.split()])), 110 + 220 * column
            fill = color.setdefault(name, COLORS[len(color) % len(COLORS)])
            parts.append(f'<path d="M{left - 28} {top + 24}h20m-5 -4l5 4l-5 4"/>')
            parts.append(f'<rect fill="{fill}" x="{left}" y="{top}" width="180" height="48" rx="4"/>')
            parts.append(f'<text x="{left + 10}" y="{top + 20}">{block}</text>')
            parts.append(f'<text class="n" x="{left + 10}" y="{top + 38}">{name.hex()[:6]}</text>')
    style = "svg{background:#fff}text{font:13px monospace;fill:#333}.n{font-size:12px;fill:#777}"
    style += "path{stroke:#555;fill:none}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 290">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--trace", type=Path, help="a trace of Mooncake's")
    parser.add_argument("--mistakes", action="store_true", help="the story, with mistakes")
    parser.add_argument("--story", action="store_true", help="the story alone, in a line")
    arguments = parser.parse_args()
    if arguments.mistakes or arguments.story:
        print("\n".join(mistakes()) if arguments.mistakes else Story().told())
    elif arguments.trace:
        print("\n".join(table(trace(arguments.trace), (1_000, 10_000, 30_000, 100_000, 200_000))))
    else:
        print("\n".join(table(made_up(), (300, 1_000, 2_000, 4_000, 20_000))))
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
