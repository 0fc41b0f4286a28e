"""Owns GET /metrics: the engine's figures under vLLM's names, with ``tiny_llm_`` before them.

What the figures are is the engine's to say (``Engine.stats``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tiny_llm.engine.stats import Histogram, Snapshot
from tiny_llm.proving.choice import OPS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(stats: Snapshot, name: str, prompt_tokens: int) -> bytes:
    """All figures as text; ``prompt_tokens`` are those of requests, cached ones included.

    Called on the engine's thread, so that they belong together.
    """
    registry = CollectorRegistry()
    registry.register(_Figures(stats, name, prompt_tokens))
    return generate_latest(registry)


class _Figures:
    """What prometheus_client asks for when it collects."""

    def __init__(self, stats: Snapshot, name: str, prompt_tokens: int) -> None:
        self._stats = stats
        self._name = name
        self._prompt_tokens = prompt_tokens

    def collect(self) -> Iterator[Metric]:
        """Every figure."""
        yield from self._gauges()
        yield from self._counters()
        yield self._labelled(
            "request_success", "Answers that ended, by why.", "finished_reason", self._stats.totals.ends
        )
        yield self._labelled("step_part_seconds", "Time of steps by part.", "part", self._stats.totals.parts)
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        stats, blocks = self._stats, self._stats.blocks
        yield self._gauge("num_requests_running", "Sequences that take part in steps.", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait.", stats.waiting)
        used = blocks.used / blocks.limit
        yield self._gauge("kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.", used)
        yield self._gauge("kv_cache_blocks", "KV blocks that there may be.", blocks.limit)
        yield self._gauge("kv_cache_used_blocks", "KV blocks in use.", blocks.used)
        yield self._gauge("kv_cache_cached_blocks", "KV blocks kept for prefixes to come.", blocks.cached)
        if stats.disk is not None:
            yield self._gauge("kv_disk_bytes", "Bytes of KV blocks on disk.", stats.disk.bytes)
        told = "1: an answer's tokens do not depend on what else is running."
        yield self._gauge("same_tokens", told, stats.same_tokens)
        family = GaugeMetricFamily(
            "tiny_llm_op_on_our_kernel", "1: on a kernel of ours; 0: on MLX's.", labels=["model_name", "op"]
        )
        for op in OPS:
            family.add_metric([self._name, op], op in stats.ops_on_ours)
        yield family

    def _counters(self) -> Iterator[Metric]:
        stats, totals = self._stats, self._stats.totals
        looked_for = stats.prefix_hit_tokens + stats.prefix_miss_tokens
        preempted = sum(stats.preempted.values())
        yield self._counter("prompt_tokens", "Tokens of prompts, cached ones included.", self._prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", totals.generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked for in the prefix cache.", looked_for)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hit_tokens)
        yield self._counter("num_preemptions", "Sequences that gave way to others.", preempted)
        for name, told, counts in (
            ("draft", "Guesses that steps checked.", stats.drafted_tokens),
            ("accepted", "Guesses that were right.", stats.accepted_tokens),
        ):
            yield self._labelled(f"spec_decode_num_{name}_tokens", told, "source", counts)
        yield self._counter("decodes", "Steps that a sequence decoded in, summed.", totals.decodes)
        if stats.disk is not None:
            events = {name: getattr(stats.disk, name) for name in ("written", "read", "dropped", "damaged")}
            yield self._labelled("kv_disk_blocks", "Blocks that went to or came from disk.", "event", events)
        yield self._counter("engine_steps", "Steps of the engine.", totals.steps)
        yield self._counter("engine_failed_steps", "Steps that failed.", totals.failed_steps)

    def _histograms(self) -> Iterator[Metric]:
        totals = self._stats.totals
        yield self._histogram("request_queue_time_seconds", "From arrival to the first step.", totals.queue_s)
        yield self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", totals.ttft_s
        )
        yield self._histogram("inter_token_latency_seconds", "From token to token.", totals.inter_token_s)
        yield self._histogram("step_seconds", "How long steps took.", totals.step_s)
        yield self._histogram("iteration_tokens", "Tokens of a step.", totals.step_tokens)
        yield self._histogram("iteration_sequences", "Sequences of a step.", totals.step_sequences)

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name"])
        family.add_metric([self._name], value)
        return family

    def _counter(self, name: str, help_: str, value: float) -> Metric:
        family = CounterMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name"])
        family.add_metric([self._name], value)
        return family

    def _labelled(self, name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
        """A counter for each value of a label."""
        family = CounterMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name", label])
        for value, count in sorted(values.items()):
            family.add_metric([self._name, value], count)
        return family

    def _histogram(self, name: str, help_: str, given: Histogram) -> Metric:
        family = HistogramMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name"])
        bounds = [*(str(float(bound)) for bound in given.bounds), "+Inf"]
        # Prometheus wants each bound with the count of all values below it, those of lower bounds included.
        buckets = list(zip(bounds, accumulate(given.counts), strict=True))
        family.add_metric([self._name], buckets, given.total)
        return family
