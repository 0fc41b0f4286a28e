"""What travels between ranks that share a model, by formula, and how long published links take for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tiny_llm.config import ModelFacts
from tiny_llm.models.ranks import gathered_bytes


class Cable(NamedTuple):
    """A link between two machines: seconds that a message takes at least, and bytes a second."""

    name: str
    latency_s: float
    bytes_s: float


CABLES: Sequence[Cable] = (Cable("10 GbE, TCP", 300e-6, 1.25e9), Cable("Thunderbolt 5, RDMA", 9e-6, 7.4e9))
"""As others report them: 300 us a message over TCP between Macs; 5-9 us and 7.4 GB/s by RDMA over Thunderbolt
5 (macOS 26.2, December 2025 and April 2026). 10 GbE's bytes by its name."""


class StepTraffic(NamedTuple):
    """Of one step of ``rows`` sequences, which each get a token: what a rank receives, and how often."""

    ranks: int
    rows: int
    layer_bytes: int  # a token
    step_bytes: int
    gathers: int

    def seconds(self, cable: Cable) -> float:
        """What the step waits for a link. Each gather is as late as its latest message."""
        return self.gathers * cable.latency_s + self.step_bytes / cable.bytes_s


def traffic(config: ModelFacts, ranks: int, rows: int, item_bytes: int) -> StepTraffic:
    """What ``ranks`` tell each other of a step, activations being of ``item_bytes``."""
    found = gathered_bytes(config, ranks, item_bytes)
    return StepTraffic(ranks, rows, found.layer, rows * (found.token + found.logits), found.gathers)


def traffic_lines(found: StepTraffic) -> list[str]:
    """It, for people: what travels, and what each link would allow at most."""
    lines = [
        f"on {found.ranks} ranks: {found.layer_bytes / 1e3:,.1f} KB a layer and token, "
        f"{found.step_bytes / found.rows / 1e3:,.1f} KB a token in all, {found.gathers} gathers a step"
    ]
    for cable in CABLES:
        took = found.seconds(cable)
        lines.append(
            f"  {cable.name} ({1e6 * cable.latency_s:g} us, {cable.bytes_s / 1e9:g} GB/s): "
            f"{1e3 * took:.1f} ms a step of {found.rows}, so at most {found.rows / took:,.0f} tokens a second"
        )
    return lines
