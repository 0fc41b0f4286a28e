"""Owns GET /metrics: the engine's figures under vLLM's names, with ``tiny_llm_`` before them.

What the figures are is the engine's to say (``Engine.stats``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tiny_llm.engine.stats import Snapshot
from tiny_llm.proving.choice import OPS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(stats: Snapshot, name: str, prompt_tokens: int) -> bytes:
    """All figures as text; ``prompt_tokens`` are those of requests, cached ones included.

    Called on the engine's thread, so that they belong together.
    """
    return generate_latest(_Figures(stats, name, prompt_tokens))


class _Figures(Collector):
    """What prometheus_client asks for when it collects."""

    def __init__(self, stats: Snapshot, name: str, prompt_tokens: int) -> None:
        self._stats = stats
        self._name = name
        self._prompt_tokens = prompt_tokens

    def collect(self) -> Iterator[Metric]:
        """Every figure."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        gauge, stats, blocks = partial(self._family, GaugeMetricFamily), self._stats, self._stats.blocks
        yield gauge("num_requests_running", "Sequences that take part in steps.", stats.running)
        yield gauge("num_requests_waiting", "Sequences that wait.", stats.waiting)
        used = blocks.used / blocks.limit
        yield gauge("kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.", used)
        yield gauge("kv_cache_blocks", "KV blocks that there may be.", blocks.limit)
        yield gauge("kv_cache_used_blocks", "KV blocks in use.", blocks.used)
        yield gauge("kv_cache_pinned_blocks", "KV blocks in use that hold contexts.", blocks.pinned)
        yield gauge("kv_cache_cached_blocks", "KV blocks kept for prefixes to come.", blocks.cached)
        if stats.disk is not None:
            yield gauge("kv_disk_bytes", "Bytes of KV blocks on disk.", stats.disk.bytes)
            yield gauge("kv_disk_kept_blocks", "KV blocks on disk.", stats.disk.blocks)
        told = "1: an answer's tokens do not depend on what else is running."
        yield gauge("same_tokens", told, stats.same_tokens)
        ours = {op: op in stats.ops_on_ours for op in OPS}
        yield gauge("op_on_our_kernel", "1: on a kernel of ours; 0: on MLX's.", ours, "op")

    def _counters(self) -> Iterator[Metric]:
        counter, stats, totals = partial(self._family, CounterMetricFamily), self._stats, self._stats.totals
        looked_for = stats.prefix_hit_tokens + stats.prefix_miss_tokens
        preempted = sum(stats.preempted.values())
        drafted, accepted = stats.drafted_tokens, stats.accepted_tokens
        yield counter("prompt_tokens", "Tokens of prompts, cached ones included.", self._prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", totals.generation_tokens)
        yield counter("prefix_cache_queries", "Tokens looked for in the prefix cache.", looked_for)
        yield counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hit_tokens)
        yield counter("num_preemptions", "Sequences that gave way to others.", preempted)
        yield counter("spec_decode_num_draft_tokens", "Guesses that steps checked.", drafted, "source")
        yield counter("spec_decode_num_accepted_tokens", "Guesses that were right.", accepted, "source")
        yield counter("decodes", "Steps that a sequence decoded in, summed.", totals.decodes)
        if stats.disk is not None:
            events = {name: getattr(stats.disk, name) for name in ("written", "read", "dropped", "damaged")}
            yield counter("kv_disk_blocks", "Blocks that went to or came from disk.", events, "event")
        yield counter("engine_steps", "Steps of the engine.", totals.steps)
        yield counter("engine_failed_steps", "Steps that failed.", totals.failed_steps)
        yield counter("request_success", "Answers that ended, by why.", totals.ends, "finished_reason")
        yield counter("step_part_seconds", "Time of steps by part.", totals.parts, "part")

    def _histograms(self) -> Iterator[Metric]:
        totals = self._stats.totals
        for name, told, given in (
            ("request_queue_time_seconds", "From arrival to the first step.", totals.queue_s),
            ("time_to_first_token_seconds", "From arrival to the first token.", totals.ttft_s),
            ("inter_token_latency_seconds", "From token to token.", totals.inter_token_s),
            ("step_seconds", "How long steps took.", totals.step_s),
            ("iteration_tokens", "Tokens of a step.", totals.step_tokens),
            ("iteration_sequences", "Sequences of a step.", totals.step_sequences),
        ):
            family = HistogramMetricFamily(f"tiny_llm_{name}", told, labels=["model_name"])
            bounds = [*(str(float(bound)) for bound in given.bounds), "+Inf"]
            # Each bound comes with the count of all values below it, those of lower bounds included.
            buckets = list(zip(bounds, accumulate(given.counts), strict=True))
            family.add_metric([self._name], buckets, given.total)
            yield family

    def _family(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        told: str,
        value: float | Mapping[str, float],
        label: str | None = None,
    ) -> Metric:
        """A figure, or one for each value of a ``label``."""
        labels = ["model_name"] if label is None else ["model_name", label]
        family = kind(f"tiny_llm_{name}", told, labels=labels)
        by_label = sorted(value.items()) if isinstance(value, Mapping) else [(None, value)]
        for one, figure in by_label:
            family.add_metric([self._name] if one is None else [self._name, one], figure)
        return family
