"""The library's front door, on the bundled model and the real 260K-parameter LLaMA."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.chapter("1.6")

SHORT = SamplingParams(max_tokens=12)
FREE = SamplingParams(max_tokens=24, temperature=3.0, ignore_eos=True)


def test_the_published_200_tokens(stories260k: Path) -> None:
    published = json.loads((stories260k / "expected_greedy_200.json").read_text())
    (completion,) = LLM(stories260k, dtype="float32").generate([1], SamplingParams(max_tokens=200))
    assert completion.token_ids == published["greedy_ids_reproduced_here"]
    assert completion.text == published["expected_text"]
    assert completion.finish_reason == "length"


def test_a_continuation_keeps_its_first_space(stories260k: Path) -> None:
    """With sentencepiece's marks: "there" went on as "therewas", and " was" never stopped anything."""
    llm = LLM(stories260k, dtype="float32")
    prompt, params = "Once upon a time, there", SamplingParams(max_tokens=3, logprobs=0)
    (whole,) = llm.generate(prompt, params)
    assert whole.text == "".join(chunk.text for chunk in llm.stream(prompt, params)) == " was a little"
    (stopped,) = llm.generate(prompt, replace(params, stop=(" was",)))
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_a_prompt_begins_with_one_bos(stories260k: Path) -> None:
    llm = LLM(stories260k)
    starts = [llm.generate(text, SHORT)[0].prompt_token_ids for text in ("", "<s>", "<s> Once", "Once")]
    assert starts[:2] == [[1], [1]], "an empty text is a BOS where the tokenizer adds one"
    assert starts[2].count(1) == starts[3].count(1) == 1


def test_a_prompt_is_text_or_ids_alone_or_in_a_list(llm: LLM) -> None:
    texts = ["Hello there", "What is a batch?"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    first, second = llm.generate(texts, SHORT)
    assert [first.prompt_token_ids, second.prompt_token_ids] == ids
    assert first.token_ids != second.token_ids
    for prompts in (texts[0], texts[:1], ids[0], tuple(ids[0]), ids[:1]):
        (alone,) = llm.generate(prompts, SHORT)
        assert (alone.text, alone.token_ids) == (first.text, first.token_ids), prompts
    assert llm.generate([], SHORT) == []


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    (completion,) = llm.generate("Once upon a time", FREE)
    assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_a_stream_is_the_same_answer_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=4, logprobs=1)
    (whole,) = llm.generate("Tell me a story", params)
    chunks = list(llm.stream("Tell me a story", params))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
    assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    last = chunks[-1].completion
    assert last is not None
    assert (last.text, last.token_ids, last.logprobs) == (whole.text, whole.token_ids, whole.logprobs)


def test_a_stream_left_early_disturbs_nothing(llm: LLM) -> None:
    (before,) = llm.generate("Hello", SHORT)
    stream = llm.stream("Hello", SHORT)
    next(stream)
    del stream
    assert llm.generate("Hello", SHORT)[0].token_ids == before.token_ids


def test_chat_answers_what_the_template_writes(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = llm.chat_prompt(messages)
    assert llm.tokenizer.decode(ids, skip_special_tokens=False) == llm.tokenizer.render_chat(messages)
    answer = llm.chat(messages, SHORT)
    assert answer.prompt_token_ids == ids
    assert answer.token_ids == llm.generate(ids, SHORT)[0].token_ids
    assert "".join(chunk.text for chunk in llm.stream_chat(messages, SHORT)) == answer.text


def test_tools_reach_the_template(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "Hello"}]
    assert "lookup" in llm.tokenizer.decode(llm.chat_prompt(messages, tools=[tool]))
    assert llm.chat(messages, SHORT, tools=[tool]).prompt_token_ids == llm.chat_prompt(messages, tools=[tool])


def test_a_seed_repeats_and_no_seed_is_a_fresh_one(llm: LLM) -> None:
    def tokens(seed: int | None) -> list[int]:
        params = SamplingParams(max_tokens=16, temperature=4.0, seed=seed, ignore_eos=True)
        return llm.generate("Hello", params)[0].token_ids

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(seed)) for seed in (3, 4, None, None)}) == 4


def test_context_ends_an_answer(llm: LLM) -> None:
    small = LLM("demo", max_context=20)
    prompt = llm.tokenizer.encode("Tell me a story about a cat")
    (completion,) = small.generate(prompt, SamplingParams(max_tokens=100, temperature=3.0, ignore_eos=True))
    assert completion.finish_reason == "length"
    assert len(prompt) + len(completion.token_ids) == 20
    with pytest.raises(RequestError, match=r"20 tokens, and this model's maximum context length is 20"):
        small.generate([prompt[0]] * 20)
    (last,) = small.generate([prompt[0]] * 19, SamplingParams(max_tokens=100, ignore_eos=True))
    assert len(last.token_ids) == 1, "one free place is one token"


@pytest.mark.parametrize("most", [0, 1, -5, 10**9, 20.5, True])
def test_max_context_must_be_possible(most: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"max_context \(--max-model-len\) is {most}, but must be from 2 to"
    ):
        LLM("demo", max_context=most)


def test_stop_string_cuts_what_would_have_been_said(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    (whole,) = llm.generate("Once upon a time", params)
    middle = whole.text[len(whole.text) // 2 :][:4]
    stopped = SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True, stop=(middle,))
    (cut,) = llm.generate("Once upon a time", stopped)
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_logprobs_belong_to_the_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=2, logprobs=3)
    (completion,) = llm.generate("Hello", params)
    assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in entry and 3 <= len(entry) <= 4
        assert sum(math.exp(value) for value in entry.values()) <= 1 + 1e-5
    assert llm.generate("Hello", SHORT)[0].logprobs is None


def test_figures_are_of_this_request(llm: LLM) -> None:
    (completion,) = llm.generate("Hello", FREE)
    timing = completion.timing
    assert timing.prompt_tokens == len(completion.prompt_token_ids)
    assert timing.completion_tokens == len(completion.token_ids) == 24
    assert timing.ttft_s > 0 and timing.decode_tok_s > 0
    assert timing.prefill_tok_s == pytest.approx(timing.prompt_tokens / timing.ttft_s)
    (one,) = llm.generate("Hello", SamplingParams(max_tokens=1))
    assert one.timing.decode_tok_s == 0, "one token has no decode rate"


def test_end_tokens_of_generation_config_count(llm: LLM, demo_copy: Path) -> None:
    spoken = llm.generate("Once upon a time", SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids
    for written in (spoken[3], [spoken[3]]):
        (demo_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        (completion,) = LLM(demo_copy).generate("Once upon a time", SamplingParams(max_tokens=8))
        assert completion.finish_reason == "stop"
        assert completion.token_ids == spoken[: spoken.index(spoken[3]) + 1]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "[" * 100_000, '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'],
    ids=["cut", "a list", "nested", "a string", "null in a list"],
)
def test_broken_generation_config_is_named(content: str, demo_copy: Path) -> None:
    (demo_copy / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        LLM(demo_copy)


def test_a_token_beyond_the_models_rows_is_refused(llm: LLM, demo_copy: Path) -> None:
    """MLX does not check an index: the row would be whatever lies in memory there."""
    tokenizer = json.loads((demo_copy / "tokenizer.json").read_text())
    beyond = llm.config.vocab_size
    new = {"id": beyond, "content": "<|new|>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append({**new, "single_word": False, "lstrip": False, "rstrip": False})
    (demo_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    wide = LLM(demo_copy)
    with pytest.raises(RequestError, match=f"Token id {beyond} is not in the vocabulary"):
        wide.generate("Hello <|new|>")
    with pytest.raises(RequestError, match=f"Token id {beyond} is not in the vocabulary"):
        wide.chat([{"role": "user", "content": "Hello <|new|>"}])


def test_an_invalid_request_is_refused_before_any_runs(llm: LLM) -> None:
    vocab = llm.config.vocab_size
    wrong: list[tuple[object, str]] = [
        ("", "prompt is empty"),
        ([[]], "prompt is empty"),
        ([vocab], f"Token id {vocab} is not in the vocabulary, which is 0 to {vocab - 1}"),
        ([-1], "Token id -1"),
        ([True], "Token id True"),
        (["fine", [0.5]], "Token id 0.5"),
        ([None], "a NoneType, but must be a string or a list of token ids"),
        (None, "prompts is a NoneType"),
        (5, "prompts is a int"),
        (b"text", "prompts is a bytes"),
        ({"role": "user"}, "prompts is a dict"),
        ([b"text"], "a bytes, but must be a string or a list of token ids"),
        (mx.array([1, 2]), "a array, but must be a string or a list of token ids"),
        ("\ud800", "half of a surrogate pair"),
        ([0] * llm.max_context, f"maximum context length is {llm.max_context} tokens"),
    ]
    for prompt, message in wrong:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.stream("")  # before the first chunk is asked for
    with pytest.raises(RequestError, match="params is a dict, but must be a SamplingParams"):
        llm.generate("Hello", {"max_tokens": 3})  # type: ignore[arg-type]


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    prompts = ["Hello", "What is a batch?", "Hello"]
    each = [SamplingParams(max_tokens=n, ignore_eos=True, n=n) for n in (1, 2, 3)]
    answers = llm.generate(prompts, each)
    assert [len(answer.token_ids) for answer in answers] == [1, 2, 2, 3, 3, 3]
    assert [answer.index for answer in answers] == [0, 0, 1, 0, 1, 2]
    assert llm.generate("Hello", [each[0]])[0].token_ids == answers[0].token_ids
    assert llm.generate([], []) == []


def test_params_that_do_not_match_the_prompts_are_refused(llm: LLM) -> None:
    for prompts, params in ((["a", "b"], [SHORT]), ("a", [SHORT, SHORT]), (["a"], []), ([1, 2], [SHORT] * 2)):
        with pytest.raises(RequestError, match=r"There are \d params for \d prompts; give one for each, or"):
            llm.generate(prompts, params)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="params is a int, but must be a SamplingParams"):
        llm.generate(["a", "b"], [SHORT, 5])  # type: ignore[list-item]


def test_a_text_is_a_message_of_the_user(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert llm.chat("Hello", SHORT).token_ids == llm.chat(messages, SHORT).token_ids
    assert llm.chat_prompt("Hello") == llm.chat_prompt(messages)
