"""Owns how a memory plan is shown: tables and bars in a terminal, the bars as an SVG, one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiny_llm.planning.memory import MemoryPlan
from tiny_llm.planning.speed import Machine, Speed

GIGA = 1e9
COLORS: Sequence[str] = ("#e6862b", "#3b7dd8", "#7aa874", "#b65fcf", "#8a8f98")
WIDTH = 48  # of the longest bar, in characters


def serving_parts(plan: MemoryPlan) -> Mapping[str, int]:
    """What serving takes: bytes by name."""
    need = plan.need
    return {
        "weights": need.weights,
        "keys and values": need.kv,
        "one step": need.activations,
        "program, whole pages": need.program,
    }


def training_parts(plan: MemoryPlan) -> Mapping[str, int]:
    """What training takes: bytes by name."""
    names = ("weights", "gradients", "float32 master copy", "Adam's moments", "kept for the way back")
    return dict(zip(names, plan.training, strict=True))


def show(plan: MemoryPlan, console: Console) -> None:
    """Print the plan: what it is for, two tables with bars, the verdict."""
    console.print(heading(plan), highlight=False)
    for title, parts in (("to serve it", serving_parts(plan)), ("to train it", training_parts(plan))):
        console.print(_table(title, parts))
    for line in verdict(plan):
        console.print(line, highlight=False)


def heading(plan: MemoryPlan) -> str:
    """One line: the model and the task."""
    kept = f"{plan.bits} bits" if plan.bits else plan.weight_dtype
    return (
        f"{plan.model} · {_count(plan.parameters)} parameters · {kept}, keys and values {plan.kv_dtype} "
        f"({size(plan.kv_token)} a token) · {plan.batch:,} x {plan.context:,} tokens"
    )


def verdict(plan: MemoryPlan) -> list[str]:
    """Whether it fits, how far the memory reaches, and whether training would fit."""
    need, free = plan.need.most, plan.available
    fits = "it fits" if plan.fits else f"{size(need - free)} too little"
    reach = [
        f"{plan.largest_context:,} tokens each at a batch of {plan.batch:,}" if plan.largest_context else "",
        f"a batch of {plan.largest_batch:,} at {plan.context:,} tokens each" if plan.largest_batch else "",
    ]
    most = " or ".join(filter(None, reach)) or "nothing, since weights and one step alone are too large"
    trains = "fits" if sum(plan.training) <= free else "does not fit"
    return [
        f"{size(free)} of memory: {fits}. At most {most}.",
        f"Training with that many tokens {trains}.",
        f"After requests of many lengths, {size(plan.need.buffers)} more may be kept for the next.",
    ]


def roofs(machine: Machine, speed: Speed) -> str:
    """What this machine allows, and the speeds that say so."""
    speeds = (machine.bytes_s, machine.matrix_flops_s, machine.attention_flops_s)
    read, matrices, attention = (speed / GIGA for speed in speeds)
    return (
        f"At most {speed.decode:,.1f} tokens a second in answers, {speed.prefill:,.0f} in a prompt: "
        f"this machine reads {read:.1f} GB/s, makes {matrices:,.0f} GFLOP/s in matrices, "
        f"{attention:,.0f} in attention."
    )


def size(count: int) -> str:
    """Bytes for a reader: below a megabyte in KiB, which KV caches are told in, else in powers of 1,000."""
    if count < 1e6:
        return f"{count / 1024:,.1f} KiB".replace(".0 ", " ")
    return f"{count / 1e6:,.0f} MB" if count < GIGA else f"{count / GIGA:,.2f} GB"


def as_json(plan: MemoryPlan) -> str:
    """The plan on one line."""
    return json.dumps({**asdict(plan), "training": plan.training._asdict(), "fits": plan.fits})


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= GIGA else f"{number / 1e6:.1f} M"


def _table(title: str, parts: Mapping[str, int]) -> Table:
    total = sum(parts.values())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row(Text(title, style="bold"), "", "")
    for (name, count), color in zip(parts.items(), COLORS, strict=False):
        table.add_row(name, _right(count), Text("█" * round(WIDTH * count / total), style=color))
    table.add_row("together", _right(total), "")
    return table


def _right(count: int) -> Text:
    return Text(size(count), justify="right")


def as_svg(plan: MemoryPlan) -> str:
    """Both bars to one scale, and a line where the memory ends."""
    bars = (("serve", serving_parts(plan)), ("train", training_parts(plan)))
    most = max(plan.available, *(sum(parts.values()) for _, parts in bars))
    scale = 600 / most
    drawn, legend = list[str](), list[str]()
    for row, (name, parts) in enumerate(bars):
        x, y = 70.0, 34 + 96 * row
        drawn.append(f'<text x="10" y="{y + 20}">{name}</text>')
        for i, ((part, count), color) in enumerate(zip(parts.items(), COLORS, strict=False)):
            wide = count * scale
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="30" fill="{color}"/>')
            x += wide
            left, down = 70 + 215 * (i % 3), y + 46 + 16 * (i // 3)
            legend.append(f'<rect x="{left}" y="{down - 9}" width="9" height="9" fill="{color}"/>')
            legend.append(f'<text x="{left + 14}" y="{down}">{part} {size(count)}</text>')
    end = 70 + plan.available * scale
    drawn.append(f'<path d="M{end:.1f} 28V70M{end:.1f} 104V166" stroke="#c22" stroke-dasharray="4 3"/>')
    anchor = "end" if end > 500 else "start"
    free = f'<text x="{end - 4 if end > 500 else end + 4:.1f}" y="114" text-anchor="{anchor}">'
    style = "svg{background:#fff}text{font:12px sans-serif;fill:#333}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 204"><style>{style}</style>',
            f'<text x="10" y="16">{heading(plan)}</text>',
            *drawn,
            *legend,
            f"{free}memory: {size(plan.available)}</text>",
            "</svg>\n",
        ]
    )
