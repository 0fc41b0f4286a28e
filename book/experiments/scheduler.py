"""Chapter 3.5: who waits how long, by what a level of priority is worth. Prints a table; --svg draws.

python book/experiments/scheduler.py --trace FILE     on a trace, such as Azure's
python book/experiments/scheduler.py [--mistakes] [--svg book/docs/img/scheduler.svg]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path

from by_mistakes import told_with
from command_line import parser_of

from tiny_llm.data import Plan
from tiny_llm.planning.simulation.costs import costs_of
from tiny_llm.planning.simulation.engine import Going, SimulatedEngine
from tiny_llm.planning.simulation.figures import Figures, ServedWell
from tiny_llm.planning.simulation.load import Load
from tiny_llm.planning.simulation.policy import Policy
from tiny_llm.planning.timeline import FirstSequences, Stretch, bars_of

COSTS = costs_of("qwen2-7b", "a100-40gb")
NEVER = 1e5  # seconds: no one waits for so long
BY_AGE = {
    "who came first": Policy(kv_tokens=36_000),
    "a level is 1 s": Policy(kv_tokens=36_000, order="priority", ageing_s=1.0),
    "a level is 10 s": Policy(kv_tokens=36_000, order="priority", ageing_s=10.0),
    "without ageing": Policy(kv_tokens=36_000, order="priority", ageing_s=NEVER),
}
RUSH = Load(requests=60, rate=6.0, lengths="300:300", spread=0.8, longest=2048, urgent=0.5, seed=4)
SMALL = Policy(kv_tokens=6_400, order="priority", ageing_s=4.0)
SHOWN = (
    "upside-down",
    "never-old-enough",
    "small-ones-overtake",
    "no-block-spared",
    "best-one-goes",
)
WIDTH, LEFT, ROW = 340, 20, 7


class Watched(FirstSequences):
    """A trace that also counts the tokens of prompts, and of what was computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.caught_up = 0

    def step(self, plan: Plan, began: float, ended: float) -> None:
        """A step was run."""
        super().step(plan, began, ended)
        self.caught_up += plan.chunk_tokens


def serve(load: Load, policy: Policy) -> tuple[list[Going], SimulatedEngine, Watched]:
    """All of a load through the scheduler: those that have ended, the engine, and what was watched."""
    done, watched = list[Going](), Watched()
    engine = SimulatedEngine(policy, COSTS, Figures(ServedWell()), done.append)
    engine.trace = watched
    for number, asked in enumerate(load, 1):
        engine.run_until(asked.at)
        engine.add(number, asked, asked.at)
    engine.run_until(inf)
    return done, engine, watched


def waits(done: Iterable[Going], priority: int) -> list[float]:
    """Seconds to the first token of those with a priority, in order."""
    return sorted(one.first - one.asked.at for one in done if one.asked.priority == priority)


def row(name: str, done: Sequence[Going], engine: SimulatedEngine) -> str:
    """The middle, the twentieth and the longest wait of both kinds, and how often somebody gave way."""
    parts = []
    for urgent in (1, 0):
        found = waits(done, urgent)
        shown = (found[len(found) // 2], found[len(found) * 19 // 20], found[-1])
        parts.append("".join(f"{value:>7.1f}" for value in shown))
    return f"{name:<22}{parts[0]}  {parts[1]}{sum(engine.scheduler.preempted.values()):>9}"


def by_age(path: Path) -> str:
    """A table: the first 1,000 requests of a trace, of which 60 % are urgent."""
    load = Load(source=str(path), requests=1000, urgent=0.6)
    lines = ["seconds to the first      urgent               others", f"{'token':<22}"]
    lines[1] += "    p50    p95   most      p50    p95   most  gave way"
    lines += [row(name, *serve(load, policy)[:2]) for name, policy in BY_AGE.items()]
    return "\n".join(lines)


def story() -> str:
    """Waits in a rush for a small pool, how often somebody gave way, and what was computed again."""
    done, engine, watched = serve(RUSH, SMALL)
    again = watched.caught_up - sum(one.asked.prompt for one in done)
    parts = "".join(f"{waits(done, urgent)[-1]:>8.1f}" for urgent in (1, 0))
    return f"{parts}{sum(engine.scheduler.preempted.values()):>10}{again:>8,}{engine.now:>9.1f}"


def mistakes() -> str:
    """The rush with mistakes of this chapter, each in a process of its own."""
    lines = [f"{'mistake':<23}  urgent  others  gave way   again   all done"]
    for name, told in told_with(__file__, "3.5", SHOWN):
        lines.append(f"{name:<23}{told}")
    return "\n".join(lines)


def picture() -> str:
    """The rush twice: a row a request, in the order in which they came; time to the right."""
    parts = list[str]()
    for column, (name, policy) in enumerate(
        (("who came first", Policy(kv_tokens=SMALL.kv_tokens)), ("a level is worth 4 s", SMALL))
    ):
        done, engine, watched = serve(RUSH, policy)
        bars = bars_of(watched.events)
        left, scale = LEFT + column * (WIDTH + 30), WIDTH / max(bar.ended for bar in bars)
        urgent = {one.seq.id for one in done if one.asked.priority}
        parts.append(f'<text x="{left}" y="16">{name}</text>')
        worst = [f"{waits(done, kind)[-1]:.0f} s" for kind in (1, 0)]
        parts.append(f'<text x="{left}" y="32">longest wait: urgent {worst[0]}, others {worst[1]}</text>')
        parts += drawn(bars, urgent, left, scale)
        parts.append(f'<text x="{left}" y="{62 + ROW * RUSH.requests}">0 s</text>')
        end = f'x="{left + WIDTH}" y="{62 + ROW * RUSH.requests}"'
        parts.append(f'<text {end} text-anchor="end">{engine.now:.0f} s</text>')
    style = (
        "svg{background:#fff}text{font:12px monospace;fill:#333}"
        ".wait{fill:#ddd}.again{fill:#c9534a}.urgent{fill:#e6862b}.other{fill:#4878a8}"
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 500">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def drawn(bars: Sequence[Stretch], urgent: set[int], left: int, scale: float) -> Iterable[str]:
    """Bars of requests: how long each waited, and was served; red where it had to make room."""
    begun = set[int]()
    for bar in bars:
        kind = "urgent" if bar.track in urgent else "other"
        if bar.name == "waiting":
            kind = "again" if bar.track in begun else "wait"
        else:
            begun.add(bar.track)
        width = max(0.6, (bar.ended - bar.began) * scale)
        place = f'x="{left + bar.began * scale:.1f}" y="{42 + ROW * (bar.track - 1)}"'
        yield f'<rect class="{kind}" {place} width="{width:.1f}" height="{ROW - 2}"/>'


def main() -> None:
    """Print a table, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--trace", type=Path, help="Azure's or Mooncake's file, whose first requests come")
    parser.add_argument("--mistakes", action="store_true")
    parser.add_argument("--story", action="store_true")
    arguments = parser.parse_args()
    if arguments.mistakes or arguments.story:
        print(mistakes() if arguments.mistakes else story())
    if arguments.trace:
        print(by_age(arguments.trace))
    if arguments.svg:
        arguments.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
