"""Owns GET /metrics: the engine's figures under vLLM's names, with ``tiny_llm_`` before them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tiny_llm.engine.llm import LLM
from tiny_llm.engine.stats import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(llm: LLM, name: str, prompt_tokens: int) -> bytes:
    """All figures as text. Called on the engine's thread, so that they belong together."""
    registry = CollectorRegistry()
    registry.register(_Figures(llm, name, prompt_tokens))
    return generate_latest(registry)


class _Figures:
    """What prometheus_client asks for when it collects."""

    def __init__(self, llm: LLM, name: str, prompt_tokens: int) -> None:
        self._llm = llm
        self._name = name
        self._prompt_tokens = prompt_tokens

    def collect(self) -> Iterator[Metric]:
        """Every figure."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        scheduler = self._llm.engine.scheduler
        usage = scheduler.usage()
        yield self._gauge("num_requests_running", "Sequences that take part in steps.", scheduler.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait.", scheduler.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.", usage.used / usage.limit
        )
        yield self._gauge("kv_cache_blocks", "KV blocks that there may be.", usage.limit)
        yield self._gauge("kv_cache_used_blocks", "KV blocks in use.", usage.used)
        yield self._gauge("kv_cache_cached_blocks", "KV blocks kept for prefixes to come.", usage.cached)

    def _counters(self) -> Iterator[Metric]:
        engine = self._llm.engine
        stats, prefix = engine.totals, engine.scheduler.blocks.prefix
        hits, misses = (prefix.hit_tokens, prefix.miss_tokens) if prefix else (0, 0)
        preempted = sum(engine.scheduler.preempted.values())
        yield self._counter("prompt_tokens", "Tokens of prompts, cached ones included.", self._prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked for in the prefix cache.", hits + misses)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", hits)
        yield self._counter("num_preemptions", "Sequences that gave way to others.", preempted)
        yield self._counter("engine_steps", "Steps of the engine.", stats.steps)
        yield self._counter("engine_failed_steps", "Steps that failed.", stats.failed_steps)
        ends = CounterMetricFamily(
            "tiny_llm_request_success",
            "Answers that ended, by why.",
            labels=["model_name", "finished_reason"],
        )
        for reason, count in sorted(stats.ends.items()):
            ends.add_metric([self._name, reason], count)
        yield ends
        parts = CounterMetricFamily(
            "tiny_llm_step_part_seconds", "Time of steps by part.", labels=["model_name", "part"]
        )
        for part, seconds in stats.parts.items():
            parts.add_metric([self._name, part], seconds)
        yield parts

    def _histograms(self) -> Iterator[Metric]:
        stats = self._llm.engine.totals
        yield self._histogram("request_queue_time_seconds", "From arrival to the first step.", stats.queue_s)
        yield self._histogram("time_to_first_token_seconds", "From arrival to the first token.", stats.ttft_s)
        yield self._histogram("inter_token_latency_seconds", "From token to token.", stats.inter_token_s)
        yield self._histogram("step_seconds", "How long steps took.", stats.step_s)
        yield self._histogram("iteration_tokens", "Tokens of a step.", stats.step_tokens)
        yield self._histogram("iteration_sequences", "Sequences of a step.", stats.step_sequences)

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name"])
        family.add_metric([self._name], value)
        return family

    def _counter(self, name: str, help_: str, value: float) -> Metric:
        family = CounterMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name"])
        family.add_metric([self._name], value)
        return family

    def _histogram(self, name: str, help_: str, given: Histogram) -> Metric:
        family = HistogramMetricFamily(f"tiny_llm_{name}", help_, labels=["model_name"])
        buckets, below = [], 0
        for bound, count in zip((*given.bounds, float("inf")), given.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), below))
        family.add_metric([self._name], buckets, given.total)
        return family
