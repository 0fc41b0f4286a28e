"""Chapter 3.4: prompts computed by another process, and their blocks brought here. Tables; --svg draws.

python book/experiments/apart.py [--time] [--mistakes] [--svg book/docs/img/apart.svg]

Two processes of the bundled model: bytes are foretold, then counted. --time measures when the first token
comes: another time on each machine. The mistakes need no model: two pools that know what each block holds.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

from by_mistakes import told_with
from command_line import parser_of

from tiny_llm.data import Plan
from tiny_llm.distributed.wire import Frame, Wire
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.handover import Handover
from tiny_llm.errors import TinyLLMError
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.decode_side import DecodeSide, _Coming
from tiny_llm.server.peer import BLOCKS, END, Peer
from tiny_llm.server.prefill_side import PrefillSide, _Asking, _Going

SHOWN = (
    "part-again",
    "from-the-beginning",
    "ends-too-early",
    "last-part-stays",
    "in-its-own-order",
    "over-a-gap",
    "not-given-back",
)
SECRET, BLOCK_BYTES, SIZE, ROOM = "an experiment", 64, 4, 60
ONE = SamplingParams(max_tokens=1, ignore_eos=True)


class Asked(NamedTuple):
    """What is told of a prompt, its ids, and whose it is."""

    what: str
    ids: list[int]
    salt: str = ""


def prompt(length: int, seed: int = 1) -> list[int]:
    """Token ids made up; a longer one of the same ``seed`` goes on where a shorter one ends."""
    chance = random.Random(seed)
    return [chance.randrange(5, 500) for _ in range(length)]


ASKED = (
    Asked("a prompt", prompt(600)),
    Asked("the same again", prompt(600)),
    Asked("200 tokens more", prompt(800)),
    Asked("40 more than that", prompt(840)),
    Asked("the first, another's", prompt(600), "another"),
    Asked("a short one", prompt(50, 2)),
    Asked("not quite so short", prompt(65, 3)),
)


@contextmanager
def two_processes() -> Iterator[tuple[AsyncLLM, DecodeSide]]:
    """This one answers; the other one computes prompts."""
    command = [sys.executable, __file__, "--prefill"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    llm = AsyncLLM("demo", threads=1)
    try:
        assert child.stdout is not None
        decode = DecodeSide(llm, Peer(f"127.0.0.1:{int(child.stdout.readline())}", SECRET, 60))
        while not decode.is_connected:
            time.sleep(0.01)
        yield llm, decode
        decode.close()
    finally:
        llm.close()
        child.kill()
        child.wait()


def prefill() -> None:
    """The other process."""
    print(PrefillSide(AsyncLLM("demo", threads=1), Peer("127.0.0.1:0", SECRET, 60)).port, flush=True)
    sys.stdin.read()


def token_bytes(llm: AsyncLLM) -> int:
    """Keys and values of a token, in 16 bits."""
    config = llm.llm.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2


def foretold(tokens: int, here: int, size: int) -> int:
    """How many blocks come of a prompt of which the first ``here`` tokens are there: none if too few lack."""
    first = here // size
    return -(-(tokens - 1) // size) - first if tokens - 1 - first * size >= 64 else 0


def table() -> Iterator[str]:
    """What is sent of each prompt, foretold and counted."""
    with two_processes() as (llm, side):
        size, a_token, there = llm.llm.engine.settings.block_size, token_bytes(llm), dict[str, int]()
        yield f"a token: {a_token:,} bytes; a block: {size} tokens"
        yield ""
        yield f"{'':<21}{'tokens':>6} {'here':>6} {'blocks':>8} {'bytes foretold':>16} {'counted':>10}"
        for what, ids, salt in ASKED:
            here = min(len(ids) - 1, there.get(f"{salt} {ids[0]}", 0)) // size * size
            before = dict(side.counts)
            asyncio.run(llm.generate(ids, ONE, salt=salt))
            came = {name: count - before[name] for name, count in side.counts.items()}
            blocks = foretold(len(ids), here, size)
            assert blocks == came["blocks"] and not came["in_vain"], (what, blocks, came)
            told = f"{what:<21}{len(ids):>6} {here:>6} {blocks:>8} {blocks * size * a_token:>16,}"
            yield f"{told} {came['bytes']:>10,}"
            there[f"{salt} {ids[0]}"] = len(ids)


def timed() -> Iterator[str]:
    """Milliseconds to the first token, the best of twelve."""
    yield "tokens   computed here   computed there   there already       bytes"
    with two_processes() as (llm, side):
        for length in (200, 400, 800):
            best = dict.fromkeys(("here", "there", "already"), 1e9)
            for number in range(12):
                for what in ("here", "there", "already"):
                    llm.llm.engine.scheduler.blocks.clear()
                    llm.supply = None if what == "here" else side.supply
                    ids, before = prompt(length, 10 * length + number), side.counts["bytes"]
                    began = time.perf_counter()
                    asyncio.run(llm.generate(ids, ONE, salt="" if what == "here" else "other"))
                    took = 1e3 * (time.perf_counter() - began)
                    best[what] = min(best[what], took)
            sent = side.counts["bytes"] - before
            here, there, already = (f"{best[what]:.1f} ms" for what in ("here", "there", "already"))
            yield f"{length:>6} {here:>15} {there:>16} {already:>15} {sent:>11,}"


class Pool:
    """An engine as a handover sees it: block accounts, and what each block really holds."""

    def __init__(self) -> None:
        self.holds: dict[int, bytes] = {}
        self.blocks = BlockManager(SIZE, ROOM)
        self.going = False
        self.scheduler = SimpleNamespace(
            blocks=self.blocks, num_running=0, sequence=lambda number: number if self.going else None
        )
        self.settings = SimpleNamespace(block_size=SIZE)
        self.runner = SimpleNamespace(give=self._give, take=self._take, move=self._move)
        self.found = self.asked = self.wrong = 0

    def _give(self, blocks: Sequence[int]) -> list[memoryview]:
        return [memoryview(self.holds.get(block, bytes(BLOCK_BYTES))) for block in blocks]

    def _take(self, data: memoryview, count: int, pairs: Sequence[tuple[int, int]]) -> None:
        for index, block in pairs:
            self.holds[block] = bytes(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])

    def _move(self, plan: Plan) -> None:
        self.holds |= {new: self.holds.get(old, b"") for old, new in plan.copies}

    def run(self, ids: list[int], salt: str) -> None:
        """A prompt as a request reads it; all but its last token are here afterwards."""
        manager = self.blocks
        table = manager.table(salt)
        known = manager.allocate(table, ids)
        assert known is not None, "no room"
        self._move(manager.drain())
        for index in range(manager.blocks_for(len(ids) - 1)):
            end = min((index + 1) * SIZE, len(ids) - 1)
            truth = hashlib.sha512(f"{salt} {ids[:end]}".encode()).digest()
            if (index + 1) * SIZE <= known:  # a part of one says less than it holds
                self.wrong += self.holds.get(table.blocks[index]) != truth
            self.holds[table.blocks[index]] = truth
        manager.free(table, ids, len(ids) - 1)
        self.asked, self.found = self.asked + len(ids) - 1, self.found + known


class Line:
    """A connection by hand that takes at most 100 bytes a call."""

    def __init__(self) -> None:
        self.data, self.at = bytearray(), 0

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Some of it."""
        sent = b"".join(buffers)[:100]
        self.data += sent
        return len(sent)

    def recv_into(self, buffer: memoryview, size: int = 0, flags: int = 0) -> int:
        """What is there."""
        part = self.data[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


class Story:
    """Thirty prompts of two people, of which many begin alike; meanwhile memory is needed, others ask."""

    def __init__(self) -> None:
        self.far, self.near, self.line = Pool(), Pool(), Line()
        wire: Any = Wire.__new__(Wire)
        wire._connection = self.line
        wire._head, wire._crc = memoryview(bytearray(32)), memoryview(bytearray(4))
        self.wire = wire
        self.side: Any = DecodeSide.__new__(DecodeSide)
        self.side._peer = SimpleNamespace(least_tokens=8)
        self.sent = self.begun = 0
        self.chance = random.Random(4)

    def bring(self, ids: list[int], salt: str) -> None:
        """What the other process computes of a prompt."""
        coming = self.side._begin(ids, salt, True, SimpleNamespace(engine=self.near))
        if coming is None:
            return
        asking: Any = _Asking.__new__(_Asking)
        asking._llm, asking._most = SimpleNamespace(llm=SimpleNamespace(engine=self.far)), 5
        asking.wire = SimpleNamespace(put=self._put)
        going = _Going(1, Handover(self.far, ids, salt), coming.first)  # type: ignore[arg-type]
        asking._going = {7: going}
        self.far.going = True
        ends = [*range(20, len(ids), 20), len(ids)]
        for end in ends:
            self.far.run(ids[:end], salt)
            self.far.going = end < len(ids)
            while 7 in asking._going and asking._send_next(7, going):
                pass
            self.read(coming)
            happens = self.chance.random()
            if happens < 0.1:
                self.near.blocks.clear()  # others needed the memory
            elif happens < 0.5:
                self.near.run(ids[: self.chance.randrange(2, len(ids))], salt)  # somebody asks the same

    def _put(self, frame: Frame, parts: Sequence[memoryview] = ()) -> None:
        self.wire._send(frame._replace(size=sum(map(len, parts))), parts)

    def read(self, coming: _Coming) -> None:
        """Frames that have come."""
        while self.line.at < len(self.line.data):
            place = bytearray()

            def space(frame: Frame, place: bytearray = place) -> memoryview:
                place.extend(bytes(frame.size))
                return memoryview(place)

            frame = self.wire.receive(space)
            self.sent += frame.size
            if frame.kind == BLOCKS and not coming.is_over:
                if not coming.handover.take(frame.first, frame.amount, memoryview(place)):
                    coming.is_over = True
            elif frame.kind == END:
                coming.is_over = True

    def told(self) -> str:
        """All of them, in a line."""
        chance, end = self.chance, ""
        texts = {(salt, n): [n] * 9 for salt in ("", "a key") for n in (1, 2)}
        try:
            while self.begun < 30:
                self.begun += 1
                salt, who = chance.choice([*texts])
                more = [chance.randrange(50) for _ in range(chance.randint(2, 30))]
                texts[salt, who] = texts[salt, who][:60] + more
                self.bring(texts[salt, who], salt)
                self.near.run(texts[salt, who], salt)
        except (AssertionError, LookupError, ValueError, TinyLLMError) as error:
            end = f"   {type(error).__name__}, prompt {self.begun}"
        near = self.near
        share, used = near.found / max(1, near.asked), near.blocks.usage([]).used
        return f"{self.sent:>7,} {share:>7.1%} {near.wrong:>6} {used:>6}{end}"


def mistakes() -> Iterator[str]:
    """The story with mistakes of this chapter, each in a process of its own."""
    yield f"{'mistake':<20} {'bytes':>6}   found  wrong   held"
    for name, told in told_with(__file__, "3.4", SHOWN):
        yield f"{name:<19} {told}"


def picture() -> str:
    """Two processes, their steps, and frames between them."""
    parts = ['<text x="8" y="54">prefill</text>', '<text x="8" y="224">decode</text>']
    color = ("#a9c8e6", "#b5d8b0", "#f3c795")
    parts.append('<rect fill="#d9d9d9" x="82" y="28" width="64" height="44" rx="4"/>')
    parts.append('<text class="n" x="114" y="54">others</text>')
    x = 150
    for number, (wide, blocks) in enumerate(((150, "0 - 31"), (150, "32 - 63"), (90, "64 - 74"))):
        parts.append(f'<rect fill="{color[number]}" x="{x}" y="28" width="{wide}" height="44" rx="4"/>')
        parts.append(f'<text class="n" x="{x + wide / 2}" y="54">chunk {number + 1}</text>')
        x += wide + 4
        parts.append(f'<path d="M{x - 4} 74L{x + 40} 196m-7 -5l7 5l1 -8"/>')
        parts.append(f'<rect fill="{color[number]}" x="{x - 18}" y="112" width="76" height="40" rx="3"/>')
        parts.append(f'<text class="n" x="{x + 20}" y="129">blocks</text>')
        parts.append(f'<text class="n" x="{x + 20}" y="145">{blocks}</text>')
    parts.append('<path d="M100 196L146 74m-8 4l8 -4l1 8"/>')
    parts.append('<rect fill="#fff" x="84" y="112" width="82" height="40" rx="3"/>')
    parts.append('<text class="n" x="125" y="129">1,200 ids,</text>')
    parts.append('<text class="n" x="125" y="145">from block 0</text>')
    for number in range(23):
        left, token = 82 + number * 28, number - 18
        fill = "#e2b6d3" if token > 0 else "#d9d9d9"
        parts.append(f'<rect fill="{fill}" x="{left}" y="198" width="24" height="44" rx="3"/>')
        parts.append(f'<text class="n" x="{left + 12}" y="225">{token if token > 0 else ""}</text>')
    parts.append('<text x="82" y="270">steps of answers under way: none carries a chunk</text>')
    parts.append(
        '<path d="M626 262L626 246m-4 6l4 -6l4 6"/><text x="560" y="280">the prompt\'s first token</text>'
    )
    style = "svg{background:#fff}text{font:13px sans-serif;fill:#333}.n{font-size:12px;text-anchor:middle}"
    style += "rect{stroke:#999}path{stroke:#555;fill:none}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 296">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    parser = parser_of(__doc__)
    for option in ("--time", "--mistakes", "--story", "--prefill"):
        parser.add_argument(option, action="store_true")
    arguments = parser.parse_args()
    if arguments.prefill:
        return prefill()
    if arguments.story:
        print(Story().told())
    elif arguments.mistakes:
        print("\n".join(mistakes()))
    elif arguments.time:
        print("\n".join(timed()))
    else:
        print("\n".join(table()))
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
