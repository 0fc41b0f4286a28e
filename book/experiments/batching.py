"""Chapter 2.9: requests served in batches, and joining and leaving at each step. Prints a table; --svg draws.

python book/experiments/batching.py [--mistakes] [--svg book/docs/img/batching.svg]
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import NamedTuple
from zlib import crc32

import numpy as np
from by_mistakes import show, told_with

from tiny_llm.data import Advance, Plan, Sequence
from tiny_llm.engine.batch import build_batch
from tiny_llm.engine.trace import Trace
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.planning.simulation.load import Asked, Load
from tiny_llm.planning.timeline import FirstSequences
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

STEP_MS, TOKEN_MS = 20.0, 0.1
"""A step reads 16 GB of weights at 800 GB/s; each of its tokens takes some arithmetic."""
SIZE = 16
LOAD = tuple(Load(requests=200, lengths="alpaca"))
FEW = tuple(
    Asked(0.0, prompt, answer)
    for prompt, answer in zip(
        (150, 90, 200, 60, 120, 180, 80, 100, 140, 70, 160, 110),
        (14, 40, 9, 22, 31, 8, 12, 35, 6, 25, 11, 18),
        strict=True,
    )
)
SHOWN = (
    "positions-begin-anew",
    "logits-of-the-items-own-rows",
    "blocks-are-neighbours",
    "gone-before-its-advance",
    "the-rejected-is-kept",
    "new-token-is-computed",
    "nothing-is-remembered",
)
WAYS: Mapping[str, tuple[str, int]] = {
    "one after the other": ("join", 1),
    "batches of 16": ("batch", 16),
    "16 at once, who is done leaves": ("leave", 16),
    "16 at once, join and leave": ("join", 16),
    "64 at once, join and leave": ("join", 64),
}


class Served(NamedTuple):
    """Steps and seconds for all, rows of decodes, how many of them nobody wanted, when each answer ended."""

    steps: int
    seconds: float
    rows: int
    unwanted: int
    ends: list[float]


def serve(load: Iterable[Asked], way: str, places: int, trace: Trace | None = None) -> Served:
    """Requests that are all there at once, with so many places.

    In a ``batch`` all go on as long as the longest, and then come the next ones. Who may ``leave`` does so at
    its end, and who may ``join`` comes when there is a place.
    """
    scheduler = Scheduler(
        BlockManager(SIZE, 20_000, prefix_cache=False),
        SchedulerSettings(max_num_seqs=places, max_step_ms=inf, max_queued_requests=10**6),
    )
    coming, now, steps, rows, unwanted = deque(enumerate(load, 1)), 0.0, 0, 0, 0
    wanted, ends, tokens = dict[int, int](), list[float](), dict[int, int]()
    while coming or len(scheduler):
        if way == "join" or not len(scheduler):
            group = [
                coming.popleft() for _ in range(len(coming) if way == "join" else min(places, len(coming)))
            ]
            longest = max((asked.answer for _, asked in group), default=0)
            for number, asked in group:
                most = longest if way == "batch" else asked.answer
                prompt = array("i", [number]) * asked.prompt
                scheduler.add(
                    Sequence(number, prompt, SamplingParams(max_tokens=most), arrival=float(number))
                )
                wanted[number] = asked.answer
                if trace is not None:
                    trace.arrived(number, 0.0)
        plan = scheduler.schedule()
        began = now
        now += (STEP_MS + TOKEN_MS * sum(len(item.tokens) for item in plan.items)) / 1e3
        steps += 1
        if trace is not None:
            trace.step(plan, began, now)
        advances = []
        for item in plan.items:
            if item.logit_rows:
                seq = scheduler.sequence(item.seq_id)
                assert seq is not None
                made = tokens[seq.id] = tokens.get(seq.id, 0) + 1
                rows, unwanted = rows + 1, unwanted + (made > wanted[seq.id])
                advances.append(Advance(seq.id, (1,), "length" if made == seq.params.max_tokens else None))
        ends += [now for seq in scheduler.commit(plan, advances) if seq.finish_reason]
    return Served(steps, now, rows, unwanted, ends)


def table() -> str:
    """Each way to serve 200 requests."""
    lines = [f"{'':<30}  steps  seconds  tokens/s  rows a step  unwanted  answer after"]
    for name, (way, places) in WAYS.items():
        one = serve(LOAD, way, places)
        speed = (one.rows - one.unwanted) / one.seconds
        mean = sum(one.ends) / len(one.ends)
        lines.append(
            f"{name:<30} {one.steps:>6,} {one.seconds:>8.0f} {speed:>9.0f} {one.rows / one.steps:>12.1f}"
            f" {one.unwanted / one.rows:>9.0%} {mean:>11.0f} s"
        )
    return "\n".join(lines)


def said(text: Iterable[int]) -> int:
    """The word that follows a text, by a model of one line: it sees each word and where it stands."""
    return crc32(array("q", [word * 4096 + at for at, word in enumerate(text)]).tobytes()) % 1000


@dataclass
class Machine:
    """A model that reads a flat batch: what each slot of its cache holds is a word and where it stands."""

    slots: dict[int, int] = field(default_factory=dict)

    def words(self, plan: Plan) -> list[int]:
        """The next word for each row of logits."""
        batch = build_batch(plan, SIZE)
        pages = batch.pages
        assert pages is not None
        for word, at, slot in zip(
            *map(np.array, (batch.tokens, batch.positions, pages.slot_mapping)), strict=True
        ):
            self.slots[int(slot)] = int(word) * 4096 + int(at)
        told = list[int]()
        tables, lengths = np.array(pages.block_tables), np.array(pages.context_lens)
        for number, (first, last) in enumerate(pairwise(batch.query_start_loc)):
            for row in range(first, last):
                seen = range(lengths[number] - (last - 1 - row))
                slots = [int(tables[number][at // SIZE]) * SIZE + at % SIZE for at in seen]
                held = array("q", [self.slots.get(slot, 0) for slot in slots])
                told.append(crc32(held.tobytes()) % 1000)
        return [told[row] for row in np.array(batch.logit_rows)]


def chats() -> Iterator[tuple[list[int], list[int]]]:
    """Twelve questions and what is answered; then twelve that go on behind these."""
    texts = list[list[int]]()
    for number in range(24):
        prompt = [100 * number + at for at in range(5 + 7 * number % 60)]
        if number >= 12:
            prompt = texts[number - 12] + prompt[:9]
        text = prompt.copy()
        for _ in range(10 + 11 * number % 30):
            text.append(said(text))
        texts.append(text)
        yield prompt, text[len(prompt) :]


def story() -> str:
    """Twenty-four questions come one at a time, three of them are taken back. What is answered, in a line."""
    settings = SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=48, max_step_ms=inf)
    guessing = {"guess": lambda seq, most: array("i", [7] * min(1, most))}  # which is hardly ever right
    scheduler, machine = Scheduler(BlockManager(SIZE, 200), settings, drafters=guessing), Machine()
    coming, due = deque(enumerate(chats())), dict[int, list[int]]()
    right = words = steps = computed = 0
    end = ""
    try:
        while (coming or len(scheduler)) and steps < 400:
            if coming and steps % 5 == 0:
                number, (prompt, answer) = coming.popleft()
                due[number] = answer
                params = SamplingParams(max_tokens=len(answer))
                scheduler.add(Sequence(number, array("i", prompt), params, arrival=float(number)))
            plan = scheduler.schedule()
            drawn = machine.words(plan) if plan.items else []
            advances, at = list[Advance](), 0
            for item in plan.items:
                if item.logit_rows:
                    own, at = drawn[at : at + item.logit_rows], at + item.logit_rows
                    kept = [own[0]]
                    for guess, word in zip(
                        item.tokens[1:] if item.logit_rows > 1 else (), own[1:], strict=False
                    ):
                        if guess != kept[-1]:
                            break
                        kept.append(word)
                    seq = scheduler.sequence(item.seq_id)
                    assert seq is not None
                    left = seq.prompt_len + seq.params.max_tokens - len(seq.tokens)
                    over = "length" if len(kept) >= left else None
                    advances.append(Advance(item.seq_id, tuple(kept[:left]), over))  # type: ignore[arg-type]
            computed += sum(len(item.tokens) for item in plan.items)
            steps += 1
            if steps % 30 == 20 and plan.decodes > 2:
                scheduler.cancel(plan.items[1].seq_id)
            for seq in scheduler.commit(plan, advances):
                if seq.finish_reason:
                    made, expected = seq.tokens[seq.prompt_len :].tolist(), due.pop(seq.id)
                    words += len(expected)
                    right += sum(a == b for a, b in zip(made, expected, strict=False))
    except (AssertionError, LookupError, StopIteration, TypeError, ValueError) as error:
        end = f"   {type(error).__name__}"
    if steps == 400:
        end = f"   {len(scheduler)} still wait"
    return f"{1 - right / max(1, words):>6.0%} {steps:>6} {computed:>9,}{end}"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<29}  wrong  steps  computed"]
    for name, told in told_with(__file__, "2.9", SHOWN):
        lines.append(f"{name:<29} {told}")
    return "\n".join(lines)


COLORS = ("#4878a8", "#5a9e5a", "#b05a8f", "#8a7340", "#3f8a8a", "#c9534a", "#7a6fb0")
PLACES, LEFT, ROW, SCALE = 4, 62, 26, 270.0


def picture() -> str:
    """Twelve requests in four places, in batches and joining and leaving, from the trace of each run."""
    stripes = '<path d="M0 0H6V6H0Z" fill="#eee"/><path d="M0 6L6 0" stroke="#999" stroke-width="1.5"/>'
    pattern = f'<pattern id="s" width="6" height="6" patternUnits="userSpaceOnUse">{stripes}</pattern>'
    style = "<style>text{font:12px monospace;fill:#333}.n{font-size:11px;fill:#fff}</style>"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 312">',
        f'{style}<defs>{pattern}</defs><rect width="760" height="312" fill="#fff"/>',
    ]
    for panel, (way, title) in enumerate((("batch", "in batches"), ("join", "join and leave at each step"))):
        trace, top = FirstSequences(), 30 + 136 * panel
        done = serve(FEW, way, PLACES, trace)
        told = f"{title}: {done.steps} steps, {done.seconds:.1f} s, {done.unwanted} rows for nobody"
        parts.append(f'<text x="{LEFT}" y="{top - 8}">{told}</text>')
        for place in range(PLACES):
            shape = f'y="{top + ROW * place}" width="{done.seconds * SCALE:.1f}" height="{ROW - 4}"'
            parts.append(f'<text x="4" y="{top + ROW * place + 16}">place {place + 1}</text>')
            parts.append(f'<rect x="{LEFT}" {shape} fill="#eee"/>')
        parts += drawn(trace, top)
    key = (("#e6862b", "prompt"), (COLORS[0], "answer"), ("url(#s)", "rows for nobody"), ("#eee", "empty"))
    for number, (fill, name) in enumerate(key):
        parts.append(f'<rect x="{LEFT + 130 * number}" y="290" width="12" height="12" fill="{fill}"/>')
        parts.append(f'<text x="{LEFT + 130 * number + 18}" y="301">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def drawn(trace: FirstSequences, top: int) -> Iterator[str]:
    """The sequences of a trace, each in the first place that is free when it begins."""
    by_track: dict[int, list[tuple[float, float]]] = {}  # a step each, the prompt's first
    for event in trace.events:
        if event["name"] in ("prefill", "decode"):
            began = float(str(event["ts"])) / 1e6
            step = began, began + float(str(event["dur"])) / 1e6
            by_track.setdefault(int(str(event["tid"])), []).append(step)
    free_at = [0.0] * PLACES
    for track, steps in by_track.items():
        place = next(n for n in range(PLACES) if free_at[n] <= steps[0][0] + 1e-6)
        free_at[place] = steps[-1][1]
        wanted, y = steps[FEW[track - 1].answer - 1][1], top + ROW * place
        parts = (
            (*steps[0], "#e6862b"),
            (steps[0][1], wanted, COLORS[track % len(COLORS)]),
            (wanted, steps[-1][1], "url(#s)"),
        )
        for began, ended, fill in parts:
            x, width = LEFT + began * SCALE, (ended - began) * SCALE
            if width:
                yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" fill="{fill}"/>'
        yield f'<text class="n" x="{LEFT + steps[0][1] * SCALE + 4:.1f}" y="{y + 15}">{track}</text>'


def main() -> None:
    """Print the table, and draw."""
    show(__doc__, table, picture, mistakes, story)


if __name__ == "__main__":
    main()
