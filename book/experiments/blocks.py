"""Chapter 3.1: what a pool holds, in runs and in blocks; what a fork costs. Prints two tables; --svg draws.

python book/experiments/blocks.py [--mistakes] [--svg book/docs/img/blocks.svg]
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from by_mistakes import show, told_with

from tiny_llm.kv.block_table import BlockTable
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.planning.simulation.contiguous import ContiguousBlocks
from tiny_llm.planning.simulation.load import Asked, Load

SLOTS, LONGEST, SIZE = 16_384, 2048, 16
LOAD = Load(requests=200, longest=LONGEST)  # lengths as ShareGPT's
SHOWN = (
    "freed-while-shared",
    "writes-into-the-shared",
    "copied-the-wrong-way",
    "forks-not-counted",
    "old-one-never-dropped",
    "copies-what-is-its-own",
)
SEEN = 400  # passes before the picture
COLORS = (
    ("#e6862b", "#f8dfc4"),
    ("#4878a8", "#cfdcea"),
    ("#5a9e5a", "#d3e7d3"),
    ("#b05a8f", "#ead2e1"),
    ("#8a7340", "#e2dac5"),
    ("#5fa8a8", "#d2e8e8"),
    ("#c9534a", "#f1d0cd"),
)

Make = Callable[[], BlockManager]


def runs(reserve: str) -> BlockManager:
    """A pool that gives each sequence one run of slots, as long as it may get."""
    return ContiguousBlocks(SLOTS, "first", reserve, LONGEST)  # type: ignore[arg-type]


def blocks(size: int) -> BlockManager:
    """The same slots, in blocks."""
    return BlockManager(size, SLOTS // size, prefix_cache=False)


POOLS: Mapping[str, Make] = {
    "run for the longest": lambda: runs("max"),
    "run, a power of two": lambda: runs("pow2"),
    "run, length foretold": lambda: runs("exact"),
    "blocks of 256": lambda: blocks(256),
    "blocks of 16": lambda: blocks(16),
    "blocks of 1": lambda: blocks(1),
}


class Moment(NamedTuple):
    """A pool after a pass in which somebody waited: how many run, slots with a token, other slots taken."""

    running: int
    held: int
    kept: int


class Running:
    """A request that has room, and how many of its tokens are there."""

    def __init__(self, asked: Asked, table: BlockTable) -> None:
        self.asked, self.table, self.tokens = asked, table, asked.prompt

    def write(self, manager: BlockManager) -> bool:
        """One more token, if there is room."""
        end = self.tokens + 1
        there = end <= self.table.writable or manager.reserve(self.table, self.tokens, end)
        self.tokens += there
        return there


def passes(manager: BlockManager) -> Iterator[tuple[list[Running], bool]]:
    """Serve all of the load at once: who runs after each pass, and whether somebody waits."""
    waiting, running = deque(LOAD), list[Running]()
    while waiting or running:
        while waiting and (one := admitted(manager, waiting[0])):
            running.append(one)
            waiting.popleft()
        for one in running.copy():
            while one in running and not one.write(manager):  # the newest gives way, and begins again
                last = running.pop()
                manager.free(last.table)
                waiting.appendleft(last.asked)
        yield running, bool(waiting)
        for one in [one for one in running if one.tokens >= one.asked.prompt + one.asked.answer]:
            manager.free(one.table)
            running.remove(one)


def admitted(manager: BlockManager, asked: Asked) -> Running | None:
    """The request with room for its prompt; None where there is no room."""
    table = manager.table(f"{asked.prompt} {asked.answer}")
    there = manager.allocate(table, range(asked.prompt))
    return None if there is None else Running(asked, table)


def moment(manager: BlockManager, running: Sequence[Running]) -> Moment:
    """What the pool holds now."""
    held = sum(one.tokens for one in running)
    used = manager.usage([(one.table, one.tokens) for one in running]).used * manager.block_size
    return Moment(len(running), held, used - held)


def pool_table() -> str:
    """Each way to give room: how many run at a time, where the slots are, and passes for all."""
    lines = ["how room is given     at once   hold tokens   kept   free   passes"]
    for name, make in POOLS.items():
        manager, total = make(), 0
        seen = list[Moment]()
        for running, waits in passes(manager):
            total += 1
            if waits:
                seen.append(moment(manager, running))
        at_once, held, kept = (sum(part) / len(seen) for part in zip(*seen, strict=True))
        free = SLOTS - held - kept
        shares = f"{held / SLOTS:>14.1%} {kept / SLOTS:>6.1%} {free / SLOTS:>6.1%}"
        lines.append(f"{name:<21} {at_once:>7.1f} {shares} {total:>8,}")
    return "\n".join(lines)


def fork_table() -> str:
    """Answers of 100 tokens to a prompt of 1,000: blocks of each in turn, and copies."""
    lines = ["answers   blocks, each alone   with forks   copied"]
    for answers in (1, 2, 4, 16):
        manager = blocks(SIZE)
        first = manager.table()
        manager.allocate(first, range(1000))
        tables = [first, *(manager.fork(first, 1000) for _ in range(answers - 1))]
        for position in range(1000, 1100):
            for table in tables:
                if position + 1 > table.writable:
                    assert manager.reserve(table, position, position + 1)
        alone = answers * manager.blocks_for(1100)
        used, copied = manager.usage([]).used, len(manager.drain().copies)
        lines.append(f"{answers:>7} {alone:>20} {used:>12} {copied:>8}")
    return "\n".join(lines)


class Story:
    """Twenty questions with four answers each, and what every slot of the pool holds."""

    def __init__(self) -> None:
        self.manager = BlockManager(SIZE, 400, prefix_cache=False)
        self.slots: dict[tuple[int, int], int] = {}
        self.running: list[tuple[BlockTable, list[int]]] = []
        self.read = self.wrong = self.copied = 0

    def write(self, table: BlockTable, text: list[int], tokens: Iterable[int]) -> None:
        """Put tokens behind a table's text, as a pass does."""
        for token in tokens:
            if len(text) >= table.writable:
                assert self.manager.reserve(table, len(text), len(text) + 1), "no room"
            for old, new in self.manager.drain().copies:
                self.copied += 1
                self.slots |= {(new, slot): self.slots.get((old, slot), -1) for slot in range(SIZE)}
            block, slot = table.blocks[len(text) // SIZE], len(text) % SIZE
            self.slots[block, slot] = token
            text.append(token)

    def ask(self, question: int) -> None:
        """A prompt, four answers to it, and a look at what everybody reads."""
        table, text = self.manager.table(), list[int]()
        self.write(table, text, [question] * (70 + question))
        self.running.append((table, text))
        for _ in range(3):
            self.running.append((self.manager.fork(table, len(text)), text.copy()))
        for _ in range(30):
            for number, (own, said) in enumerate(self.running):
                self.write(own, said, [1000 * question + number])
        for own, said in self.running:
            self.read += len(said)
            self.wrong += sum(
                self.slots.get((own.blocks[at // SIZE], at % SIZE)) != token for at, token in enumerate(said)
            )
        while len(self.running) > 5:  # the last question's answers end, all but one
            self.manager.free(self.running.pop(0)[0])

    def told(self) -> str:
        """The whole story in a line."""
        end = ""
        try:
            for question in range(1, 21):
                self.ask(question)
            for table, _ in self.running:
                self.manager.free(table)
        except (AssertionError, LookupError, StopIteration, ValueError) as error:
            end = f"   {error}, at question {question}"
        lost = 0 if end else self.manager.usage([]).used
        return f"{self.wrong / max(1, self.read):>6.1%} {self.copied:>8} {lost:>6}{end}"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<24}  wrong   copied   lost"]
    for name, told in told_with(__file__, "3.1", SHOWN):
        lines.append(f"{name:<24} {told}")
    return "\n".join(lines)


def picture() -> str:
    """Three pools after the same number of passes: whose each slot is, pale where it holds no token."""
    parts = list[str]()
    for column, name in enumerate(("run for the longest", "run, length foretold", "blocks of 16")):
        manager = POOLS[name]()
        running, _ = next(islice(passes(manager), SEEN, None))
        held, left = sum(one.tokens for one in running) / SLOTS, 20 + 250 * column
        parts.append(f'<text x="{left}" y="18">{name}</text>')
        parts.append(f'<text x="{left}" y="34">{len(running)} at once, {held:.0%} hold tokens</text>')
        parts.append(f'<rect stroke="#333" x="{left - 1}" y="43" width="226" height="226"/>')
        for color, cells in drawn(manager, running).items():
            path = "".join(f"M{left + 7 * (cell % 32)} {47 + 7 * (cell // 32)}h6" for cell in cells)
            parts.append(f'<path class="{color}" d="{path}"/>')
    styles = [f".c{n}{{stroke:{full}}}.p{n}{{stroke:{pale}}}" for n, (full, pale) in enumerate(COLORS)]
    style = "svg,rect{background:#fff;fill:#fff}path{stroke-width:6}text{font:12px monospace;fill:#333}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 280">'
    return "\n".join([f"{head}<style>{style}{''.join(styles)}</style>", *parts, "</svg>\n"])


def drawn(manager: BlockManager, running: Sequence[Running]) -> Mapping[str, list[int]]:
    """By colour, the cells of 16 slots that are somebody's: full ones hold tokens, pale ones are kept."""
    found: dict[str, list[int]] = {}
    size = manager.block_size
    for one in running:
        seen = set[int]()
        for index, block in enumerate(one.table.blocks):
            cell = block * size // SIZE
            if cell not in seen:
                seen.add(cell)
                kind = "c" if index * size < one.tokens else "p"
                found.setdefault(f"{kind}{one.asked.prompt % len(COLORS)}", []).append(cell)
    return found


def main() -> None:
    """Print the tables, and draw."""
    show(__doc__, lambda: f"{pool_table()}\n\n{fork_table()}", picture, mistakes, lambda: Story().told())


if __name__ == "__main__":
    main()
