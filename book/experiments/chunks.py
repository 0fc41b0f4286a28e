"""Chapter 2.10: how long running answers wait while prompts are read, at three bounds. Prints; --svg draws.

python book/experiments/chunks.py [--mistakes] [--svg book/docs/img/chunks.svg]
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from by_mistakes import show, told_with

from tiny_llm import data
from tiny_llm.data import Advance, Plan, StepCosts
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

MACHINE = StepCosts(step=20.0, decode=0.1, decode_context=1e-4, chunk=0.1, chunk_context=4e-6)
"""What steps really take, in ms: 16 GB of weights at 800 GB/s, arithmetic, attention."""
GUESS = StepCosts(step=1.0, decode=0.01, decode_context=1e-5, chunk=0.01, chunk_context=1e-6)
"""How the scheduler believes that these compare, before it has seen a step."""
ANSWERS, PROMPT, COME = 8, 8000, (1.0, 2.5, 4.0)
"""So many answers are under way, and prompts of so many tokens come at these seconds."""
BOUNDS: Mapping[str, float] = {"none": inf, "200 ms": 200.0, "50 ms": 50.0}
SHOWN = (
    "each-chunk-alone",
    "as-at-the-beginning",
    "nobody-gets-a-few",
    "start-counted-once",
    "no-margin",
)


class Step(NamedTuple):
    """When a step began (seconds), what it took (ms), and the tokens of prompts in it."""

    began: float
    ms: float
    chunk: int


class Run(NamedTuple):
    """The steps of a run, and how long each prompt waited for its first token (seconds, or inf)."""

    steps: list[Step]
    waits: list[float]


def took(plan: Plan) -> float:
    """Milliseconds of a step."""
    rows = plan.decodes + plan.drafted
    work = (1.0, rows, plan.decode_context, plan.chunk_tokens, plan.chunk_context)
    return sum(cost * count for cost, count in zip(MACHINE[:5], work, strict=True))


def run(
    bound: float,
    answers: int = ANSWERS,
    come: Sequence[float] = COME,
    prompt: int = PROMPT,
    until: float = 10.0,
    began: int = 200,
) -> Run:
    """Answers to prompts of ``began`` tokens that go on for ever, beside which prompts come."""
    settings = SchedulerSettings(max_num_batched_tokens=2**15, max_num_seqs=1000, max_step_ms=bound)
    scheduler = Scheduler(BlockManager(16, 40_000, prefix_cache=False), settings, GUESS)
    params, now, due, steps = SamplingParams(max_tokens=10**4), 0.0, list(come), list[Step]()
    first: dict[int, float] = {}
    for number in range(answers):
        scheduler.add(data.Sequence(number, array("i", [1] * began), params))
    while now < until:
        while due and due[0] <= now:
            number = 1000 + len(come) - len(due)
            scheduler.add(data.Sequence(number, array("i", [1] * prompt), params, arrival=due.pop(0)))
        plan = scheduler.schedule()
        ms = took(plan)
        steps.append(Step(now, ms, plan.chunk_tokens))
        now += ms / 1e3
        scheduler.speed.observe(plan, ms)
        for one in plan.items:
            if one.logit_rows:
                first.setdefault(one.seq_id, now)
        advances = [Advance(one.seq_id, (1,)) for one in plan.items if one.logit_rows]
        scheduler.commit(plan, advances)
    return Run(steps, [first.get(1000 + n, inf) - at for n, at in enumerate(come)])


def row(name: str, one: Run) -> str:
    """A run in a line: the longest gap, one in a hundred, the mean wait, the tokens that answers got."""
    gaps = sorted(step.ms for step in one.steps if step.began >= 0.9)
    wait = sum(one.waits) / len(one.waits)
    told = "never" if wait == inf else f"{wait:.2f} s"
    return f"{name:<22} {gaps[-1]:>8.0f} ms {gaps[len(gaps) * 99 // 100]:>8.0f} ms {told:>12} {len(gaps):>7}"


def tables() -> str:
    """The three bounds; and chunks of a prompt of 100,000, of equal length and in equal time."""
    lines = [f"{'bound of a step':<22} longest gap  1 of 100 prompt waits   steps"]
    lines += [row(name, run(bound)) for name, bound in BOUNDS.items()]
    lines += ["", "prompt of 100,000, at token       0   25,000   50,000   75,000"]
    fixed = [MACHINE.step + 0.8 + 0.1 * 250 + 4e-6 * 250 * start for start in range(0, 100_000, 25_000)]
    lines.append(f"{'step with 250 of it':<26}" + "".join(f"{ms:>6.0f} ms" for ms in fixed))
    steps = [step for step in run(50.0, come=(1.0,), prompt=100_000, until=60.0).steps if step.chunk]
    done, at = 0, list[Step]()
    for step in steps:
        if done >= 25_000 * len(at) and len(at) < 4 and step.began > 1.0:
            at.append(step)
        done += step.chunk if step.began > 1.0 else 0
    lines.append(f"{'step bounded to 50 ms':<26}" + "".join(f"{step.ms:>6.0f} ms" for step in at))
    lines.append(f"{'   tokens of it':<26}" + "".join(f"{step.chunk:>9}" for step in at))
    return "\n".join(lines)


def story() -> str:
    """A long prompt beside eight answers, and two short ones beside 400; at 50 ms."""
    deep = run(50.0, come=(1.0,), prompt=30_000, until=16.0)
    crowd = run(50.0, answers=400, come=(2.0, 2.0), prompt=300, until=12.0, began=20)
    return f"{max(s.ms for s in deep.steps if s.began > 1.3):>9.0f} ms" + told(deep) + told(crowd)


def told(one: Run) -> str:
    """How long prompts waited."""
    wait = max(one.waits)
    return f"{'never':>14}" if wait == inf else f"{wait:>12.1f} s"


def mistakes() -> str:
    """The story with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<24} longest gap  30,000 wait  beside 400"]
    for name, told in told_with(__file__, "2.10", SHOWN):
        lines.append(f"{name:<24} {told}")
    return "\n".join(lines)


LEFT, WIDE, HIGH, SPAN = 64, 680, 78, (0.7, 9.0)


def picture() -> str:
    """Each step at three bounds: as wide and as high as it is long; orange is the prompt's part of it."""
    style = "<style>text{font:12px monospace;fill:#333}</style>"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 360">',
        f'{style}<rect width="760" height="360" fill="#fff"/>',
    ]
    scale, ms_high = WIDE / (SPAN[1] - SPAN[0]), HIGH / 1000
    for panel, (name, bound) in enumerate(BOUNDS.items()):
        one, bottom = run(bound), 100 + 110 * panel
        gap = max(step.ms for step in one.steps if step.began > 0.9)
        parts.append(
            f'<text x="{LEFT}" y="{bottom - HIGH - 8}">bound: {name}, longest gap {gap:.0f} ms</text>'
        )
        parts.append(f'<text x="4" y="{bottom - HIGH + 8}">1 s</text><text x="4" y="{bottom}">0</text>')
        parts.append(f'<path d="M{LEFT} {bottom - HIGH}V{bottom}H{LEFT + WIDE}" fill="none" stroke="#999"/>')
        shapes: dict[str, list[str]] = {"#3b78b5": [], "#e6862b": []}
        for step in one.steps:
            if SPAN[0] <= step.began and step.began + step.ms / 1e3 <= SPAN[1]:
                x, width = LEFT + (step.began - SPAN[0]) * scale, max(0.6, step.ms / 1e3 * scale - 0.4)
                high = step.ms * ms_high
                own = min(high, (MACHINE.step + ANSWERS * MACHINE.decode) * ms_high)
                shapes["#3b78b5"].append(f"M{x:.1f} {bottom}h{width:.1f}v-{own:.1f}h-{width:.1f}z")
                if step.chunk:
                    shapes["#e6862b"].append(
                        f"M{x:.1f} {bottom - own:.1f}h{width:.1f}v-{high - own:.1f}h-{width:.1f}z"
                    )
        parts += [f'<path d="{"".join(path)}" fill="{color}"/>' for color, path in shapes.items() if path]
        for at, wait in zip(COME, one.waits, strict=True):
            x, end = (LEFT + (when - SPAN[0]) * scale for when in (at, at + wait))
            line = f"M{x:.1f} {bottom + 3}V{bottom + 9}H{end:.1f}V{bottom + 3}"
            parts.append(f'<path d="{line}" fill="none" stroke="#8a5aa8"/>')
    key = (("#3b78b5", "decodes"), ("#e6862b", "chunk of a prompt"), ("#8a5aa8", "prompt waits"))
    for number, (fill, label) in enumerate(key):
        x = LEFT + (0, 110, 290)[number]
        parts.append(f'<rect x="{x}" y="342" width="12" height="12" fill="{fill}"/>')
        parts.append(f'<text x="{x + 18}" y="353">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    show(__doc__, tables, picture, mistakes, story)


if __name__ == "__main__":
    main()
