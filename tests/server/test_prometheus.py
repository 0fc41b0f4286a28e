"""/metrics tells what Engine.stats tells, figure by figure."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tiny_llm import LLM, SamplingParams
from tiny_llm.engine.engine import EngineSettings
from tiny_llm.server.prometheus import exposition


def test_metrics_are_the_engines_own_figures() -> None:
    """In the middle of some traffic: one sequence runs, one waits, one has ended, a prefix was found."""
    llm = LLM("demo", engine=EngineSettings(kv_blocks=12, block_size=16))
    llm.generate([5] * 60, SamplingParams(max_tokens=4, ignore_eos=True))
    for prompt in ([5] * 60, [6] * 150):
        llm.engine.add(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
    llm.engine.step()
    stats = llm.engine.stats()
    text = exposition(stats, "m", 17).decode()
    told = {
        (
            sample.name.removeprefix("tiny_llm_"),
            *(v for k, v in sample.labels.items() if k != "model_name"),
        ): (sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    blocks, totals = stats.blocks, stats.totals
    assert (stats.running, stats.waiting) == (1, 1) and stats.prefix_hit_tokens and blocks.used
    expected = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "kv_cache_usage_perc": blocks.used / 12,
        "kv_cache_blocks": 12,
        "kv_cache_used_blocks": blocks.used,
        "kv_cache_pinned_blocks": blocks.pinned,
        "kv_cache_cached_blocks": blocks.cached,
        "prompt_tokens_total": 17,
        "generation_tokens_total": totals.generation_tokens,
        "prefix_cache_queries_total": stats.prefix_hit_tokens + stats.prefix_miss_tokens,
        "prefix_cache_hits_total": stats.prefix_hit_tokens,
        "num_preemptions_total": sum(stats.preempted.values()),
        "engine_steps_total": totals.steps,
        "decodes_total": totals.decodes,
        "engine_failed_steps_total": 0,
        "time_to_first_token_seconds_count": sum(totals.ttft_s.counts),
        "time_to_first_token_seconds_sum": totals.ttft_s.total,
        "iteration_tokens_sum": totals.step_tokens.total,
    }
    assert {name: told[name,] for name in expected} == expected
    assert told["request_success_total", "length"] == totals.ends["length"] == 1
    right = stats.accepted_tokens["ngram"]
    assert told["spec_decode_num_accepted_tokens_total", "ngram"] == right
    assert told["spec_decode_num_draft_tokens_total", "ngram"] == stats.drafted_tokens["ngram"] >= right
    assert told["spec_decode_num_draft_tokens_total", "prediction"] == 0
    assert told["step_part_seconds_total", "forward"] == totals.parts["forward"] > 0
    below = [told["iteration_tokens_bucket", f"{float(bound)}"] for bound in totals.step_tokens.bounds]
    counts = totals.step_tokens.counts
    assert below == [sum(counts[: i + 1]) for i in range(len(below))], "each bucket holds those below it"
    assert told["iteration_tokens_bucket", "+Inf"] == sum(counts)
