"""What one request is at each station on its way through the engine. Prints a table; --svg draws the way.

python book/experiments/request.py [--svg book/docs/img/request.svg]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from command_line import parser_of

from tiny_llm import LLM, SamplingParams
from tiny_llm.config import ModelConfig
from tiny_llm.data import Batch, Chunk, KVCache, Plan
from tiny_llm.models.registry import Model

PACKAGE = Path(__file__).resolve().parents[2] / "tiny_llm"
QUESTION = "What is 48 + 35?"


class Station(NamedTuple):
    """A place that the request comes by, and what it is there. ``step``: it does so in each step."""

    name: str
    file: str
    there: str
    step: bool = False


@dataclass
class Watched:
    """The model, and a note of what it was given and gave."""

    model: Model
    batches: list[Batch] = field(default_factory=list)
    logits: list[mx.array] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        """Run the model."""
        self.batches.append(batch)
        self.logits.append(self.model(batch, kv))
        return self.logits[-1]


@dataclass(frozen=True)
class Seen:
    """A request from end to end."""

    prompt: str
    ids: Sequence[int]
    plans: Sequence[Plan]
    watched: Watched
    chunks: Sequence[Chunk]


def follow() -> Seen:
    """Ask the bundled model, one step at a time, and note what passes."""
    llm = LLM("demo")
    watched = Watched(llm._model)
    llm._model = watched
    settings = llm.engine.settings
    llm = llm.with_engine(replace(settings, async_scheduling=False, kv_blocks=64))
    plans: list[Plan] = []
    commit = llm.engine.scheduler.commit
    llm.engine.scheduler.commit = lambda plan, *given: plans.append(plan) or commit(plan, *given)  # type: ignore[method-assign, func-returns-value]
    messages = [{"role": "user", "content": QUESTION}]
    ids = llm.chat_prompt(messages)
    chunks = list(llm.stream_chat(messages, SamplingParams(max_tokens=32, speculate=False)))
    return Seen(llm.tokenizer.render_chat(messages), ids, plans, watched, chunks)


def stations(seen: Seen) -> list[Station]:
    """The way, with the first step's plan, batch and logits, and the whole answer."""
    (item,) = seen.plans[0].items
    blocks = -(-len(seen.ids) // 16)
    logits, batch = seen.watched.logits[0], seen.watched.batches[0]
    token = seen.chunks[0].token_ids[0]
    completion = seen.chunks[-1].completion
    assert completion is not None
    config = seen.watched.config
    return [
        Station("request", "server/chat_completions.py", f'{{"role": "user", "content": "{QUESTION}"}}'),
        Station("chat template", "tokenizer/chat_template.py", repr(seen.prompt)),
        Station("token ids", "tokenizer/tokenizer.py", f"{len(seen.ids)} ids: {_some(seen.ids)}"),
        Station("queue", "scheduler/queues.py", f"sequence {item.seq_id}, waiting"),
        Station(
            "plan",
            "scheduler/scheduler.py",
            f"sequence {item.seq_id}: tokens {item.start} to {item.start + len(item.tokens) - 1}, "
            f"in blocks {_some(item.block_table[:blocks])}",
            True,
        ),
        Station(
            "batch",
            "engine/batch.py",
            f"tokens [{batch.tokens.size}], positions [{batch.positions.size}], "
            f"logits wanted of row {batch.logit_rows.item()}",
            True,
        ),
        Station(
            "model",
            "models/decoder.py",
            f"{config.num_layers} layers: [{batch.tokens.size}, {config.hidden_size}] in and out of each",
            True,
        ),
        Station(
            "keys and values",
            "kv/paged.py",
            f"{len(item.tokens)} tokens written, {len(item.tokens)} read, in each layer",
            True,
        ),
        Station("logits", "layers/embedding.py", f"{list(logits.shape)}: a number for each token", True),
        Station("sampling", "sampling/sampler.py", f"the largest: id {token}", True),
        Station("text", "tokenizer/detokenizer.py", repr(seen.chunks[0].text), True),
        Station("commit", "scheduler/scheduler.py", f"sequence {item.seq_id} has one more token", True),
        Station(
            "answer",
            "server/answers.py",
            f"{completion.text!r}, {completion.finish_reason}, after {len(seen.plans)} steps",
        ),
    ]


def _some(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:4]))
    return f"{shown}, ..." if len(ids) > 4 else shown


def table(way: Sequence[Station]) -> str:
    """A line a station; those of a step have a bar before them."""
    lines = [f"{'':2}{'station':<16} {'in tiny_llm/':<28} the request there"]
    for station in way:
        assert (PACKAGE / station.file).is_file(), station.file
        lines.append(f"{'|' if station.step else '':2}{station.name:<16} {station.file:<28} {station.there}")
    return "\n".join(lines)


def picture(way: Sequence[Station]) -> str:
    """Boxes from top to bottom, and the loop of steps beside them."""
    high, drawn = 46, list[str]()
    for i, station in enumerate(way):
        y = 10 + i * high
        kind = "step" if station.step else "once"
        drawn.append(f'<rect class="{kind}" x="60" y="{y}" width="250" height="34" rx="5"/>')
        drawn.append(f'<text class="name" x="70" y="{y + 15}">{station.name}</text>')
        drawn.append(f'<text class="file" x="70" y="{y + 28}">{station.file}</text>')
        drawn.append(f'<text x="326" y="{y + 21}">{escape(station.there)}</text>')
        if i:
            drawn.append(f'<path d="M185 {y - 12}v9m-3 -4l3 4l3 -4"/>')
    steps = [i for i, station in enumerate(way) if station.step]
    top, bottom = 27 + steps[0] * high, 27 + steps[-1] * high
    drawn.append(f'<path d="M60 {bottom}H30V{top}H57m-5 -3l5 3l-5 3"/>')
    middle = (top + bottom) // 2
    drawn.append(
        f'<text transform="translate(22,{middle}) rotate(-90)" text-anchor="middle">each step</text>'
    )
    style = (
        "svg{background:#fff}text{font:11px sans-serif;fill:#333;white-space:pre}.name{font-weight:bold}"
        ".file{font:9.5px monospace;fill:#666}path{fill:none;stroke:#555}"
        ".once{fill:#eef2f7;stroke:#8aa}.step{fill:#fdf0e1;stroke:#e6862b}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {10 + len(way) * high}">'
    return "\n".join([f"{head}<style>{style}</style>", *drawn, "</svg>\n"])


def main() -> None:
    """Print the table, and draw."""
    arguments = parser_of(__doc__).parse_args()
    way = stations(follow())
    print(table(way))
    if arguments.svg:
        arguments.svg.write_text(picture(way), encoding="utf-8")


if __name__ == "__main__":
    main()
