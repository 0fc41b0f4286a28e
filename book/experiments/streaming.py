"""Chapter 3.6: four readers of one engine, step by step. Prints tables; --svg draws the picture.

python book/experiments/streaming.py [--mistakes] [--svg book/docs/img/streaming.svg]

The engine is stepped by hand, so there is no clock: what is counted is the same on every machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

from by_mistakes import show, told_with

from tiny_llm.data import Chunk, Completion, Timing
from tiny_llm.engine.async_llm import AsyncLLM, EngineDeadError, _hand_over
from tiny_llm.engine.open_requests import Event
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.events import DONE, EventStream, event_of

SHOWN = (
    "call-a-chunk",
    "one-at-a-time",
    "sent-ahead",
    "never-cancelled",
    "told-as-an-end",
    "fault-cuts-off",
)
TOKENS, PERIOD, LEAVES, BREAKS = 60, 8, 10, 30
STEPS = 600


class Engine(AsyncLLM):
    """Whose thread is a method: ``step`` does what was posted, and then gives each open request a token."""

    def __init__(self, tokens: int, breaks: int) -> None:
        self._jobs: list[Callable[[], None]] = []
        self._asked = {}
        self._tokens, self._breaks = tokens, breaks
        self.made: dict[int, int] = {}
        engine = SimpleNamespace(add=self._added, cancel=lambda number: None)
        self.llm = SimpleNamespace(check=lambda ids, params: (ids, SamplingParams()), engine=engine)  # type: ignore[assignment]

    def _added(self, ids: list[int], params: SamplingParams, **_: Any) -> int:
        self.made[ids[0]] = 0
        return ids[0]

    def _require_alive(self) -> None:
        pass

    def post(self, job: Callable[[], None]) -> None:
        """Have it done by the next step."""
        self._jobs.append(job)

    @property
    def open(self) -> bool:
        """Whether it has still something to do."""
        return bool(self._asked or self._jobs)

    def step(self) -> None:
        """A token for each; reader 3's answer breaks."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job()
        events = []
        for number in list(self._asked):
            if number == 3 and self.made[number] == self._breaks:
                _hand_over([(self._asked.pop(number), EngineDeadError("The answer broke."))])
                continue
            self.made[number] += 1
            text = f" {self.made[number]}"
            whole = Completion(text, [1], "length", [1], None, Timing(1, 1, 0, 0, 0))
            is_last = self.made[number] == self._tokens
            events.append(Event(number, Chunk(text, (1,), whole if is_last else None)))
        self._deliver(events)


class Reader:
    """Takes a piece each ``period`` steps, and is gone after step ``leaves``."""

    def __init__(self, number: int, period: int, leaves: int = STEPS) -> None:
        self.number, self._period, self._leaves = number, period, leaves
        self.pieces: list[tuple[int, bytes]] = []
        self.told = self.held = 0
        self.end: int | None = None
        self._now = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def waits(self) -> bool:
        """Whether something is sent to it that it has not taken."""
        return bool(self._waiting)

    async def send(self, message: Any) -> None:
        """A server's: returns when the reader has taken it."""
        if not message.get("body"):
            return
        taken = asyncio.get_running_loop().create_future()
        self._waiting.append(taken)
        await taken
        self.pieces.append((self._now, message["body"]))
        self.told += message["body"].count(b'{"text"')
        if message["body"].endswith(DONE):
            self.end = self._now

    def tick(self, now: int) -> None:
        """A step is over."""
        self._now = now
        if now > self._leaves:
            for one in self._waiting:
                one.set_exception(OSError("nobody is there"))
            self._waiting.clear()
        elif self._waiting and not now % self._period:
            self._waiting.pop(0).set_result(None)


class Loop(asyncio.SelectorEventLoop):
    """Counts how often another thread would have woken it."""

    wakes = 0

    def call_soon_threadsafe(self, *given: Any, **more: Any) -> Any:
        """As ever."""
        self.wakes += 1
        return super().call_soon_threadsafe(*given, **more)


async def events(engine: Engine, number: int) -> AsyncGenerator[bytes, None]:
    """As the server's: what came together is one piece."""
    async with aclosing(engine.streams([[number]])) as stream:
        async for came in stream:
            yield b"".join([event_of({"text": chunk.text}) for _, chunk in came])
    yield DONE


async def settle() -> None:
    """All that can run runs."""
    for _ in range(20):
        await asyncio.sleep(0)


async def serve(readers: list[Reader], engine: Engine) -> int:
    """Until all have their ends, or nothing more comes; how often the loop was woken."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    loop.set_exception_handler(lambda *_: None)  # mistakes are told by what comes of them
    responses = [(EventStream(events(engine, one.number)), one.send) for one in readers]
    tasks = [asyncio.ensure_future(response.stream_response(send)) for response, send in responses]
    await settle()
    before = loop.wakes
    for now in range(1, STEPS + 1):
        engine.step()
        await settle()
        for one in readers:
            one.tick(now)
        await settle()
        going = [one for one, task in zip(readers, tasks, strict=True) if not task.done()]
        for one in going:
            one.held = max(one.held, engine.made[one.number] - one.told)
        if not (going or engine.open or any(one.waits for one in readers)):
            break
    woken = loop.wakes - before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return woken


def story(tokens: int = TOKENS, period: int = PERIOD, leaves: int = LEAVES, breaks: int = BREAKS) -> Any:
    """The four readers, the engine, and how often the loop was woken."""
    engine = Engine(tokens, breaks)
    with asyncio.Runner(loop_factory=Loop) as runner:
        readers = [Reader(0, 1), Reader(1, period), Reader(2, 1, leaves), Reader(3, 1)]
        return readers, engine, runner.run(serve(readers, engine))


def heard(one: Reader) -> str:
    """How a reader's stream ended."""
    said = b"".join(piece for _, piece in one.pieces)
    parts = ["error"] * (b'"error"' in said) + ["[DONE]"] * said.endswith(DONE)
    return ", ".join(parts) or "nothing"


def in_a_line() -> str:
    """The story as a row of the table of mistakes."""
    (quick, slow, left, broken), engine, woken = story()
    nobody = engine.made[2] - left.told
    end = slow.end or "never"
    return f"{woken:>6} {quick.told:>8} {slow.told:>8} {slow.held:>6} {end:>6} {nobody:>8}    {heard(broken)}"


def mistakes() -> str:
    """The story with mistakes of this chapter."""
    head = f"{'mistake':<17}{'calls':>6} {'quick':>8} {'slow':>8} {'held':>6} {'end':>6} {'in vain':>8}"
    head += "    who broke hears"
    rows = told_with(__file__, "3.6", SHOWN)
    return "\n".join([head, *(f"{name:<17}{told}" for name, told in rows)])


def table() -> str:
    """What readers of different speed hold, and what is sent to them."""
    rows = ["one piece     pieces   tokens in the   tokens held   ends"]
    rows.append("in            written   largest one       at most   in step")
    for period in (1, 2, 4, 8, 16, 32, 64):
        (_, slow, *_), _, _ = story(period=period)
        counts = [piece.count(b'{"text"') for _, piece in slow.pieces]
        rows.append(
            f"{period:>2} step{'s' if period > 1 else ' '} {len(counts):>12} {max(counts):>13} "
            f"{slow.held:>13} {slow.end:>9}"
        )
    return "\n".join(rows)


ROWS = ("quick", "slow", "leaves", "breaks")
FILL = ("#a9c8e6", "#f3c795", "#b5d8b0", "#e2b6d3")
LEFT, WIDE, HIGH = 84, 22, 64


def picture() -> str:
    """Each reader's tokens as dots at the step that made them, and pieces at the step they were taken."""
    readers, engine, _ = story(24, 6, 9, 14)
    parts = [f'<text x="{LEFT}" y="18">steps of the engine →</text>']
    for row, one in enumerate(readers):
        top = 34 + row * HIGH
        parts.append(f'<text x="8" y="{top + 22}">{ROWS[row]}</text>')
        told = 0
        for now, piece in one.pieces:
            count, x = piece.count(b'{"text"'), LEFT + now * WIDE
            is_fault = b'"error"' in piece
            for number in range(told + 1, told + count + 1):
                parts.append(f'<path d="M{LEFT + number * WIDE} {top + 8}L{x} {top + 30}"/>')
            told += count
            fill = "#e08a80" if is_fault else "#d9d9d9" if not count else FILL[row]
            label = "!" if is_fault else "■" if not count else str(count)
            parts.append(f'<rect fill="{fill}" x="{x - 10}" y="{top + 30}" width="20" height="18" rx="3"/>')
            parts.append(f'<text class="n" x="{x}" y="{top + 43}">{label}</text>')
        for number in range(1, engine.made[one.number] + 1):
            lost = number > told
            x = LEFT + number * WIDE
            parts.append(f'<circle fill="{"#fff" if lost else FILL[row]}" cx="{x}" cy="{top + 6}" r="5"/>')
    height = 34 + len(readers) * HIGH
    style = "svg{background:#fff}text{font:13px sans-serif;fill:#333}.n{font-size:12px;text-anchor:middle}"
    style += "path{stroke:#999;fill:none}circle{stroke:#777}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


if __name__ == "__main__":
    show(__doc__, table, picture, mistakes, in_a_line)
