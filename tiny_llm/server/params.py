"""Owns the step from a checked body to what the engine takes: token ids and SamplingParams.

Runs in a worker thread: templates and tokenizers may take their time. Raises Problem or RequestError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiny_llm.decoding.grammar import THINK, Grammar, lark_grammar, regex_grammar, response_grammar
from tiny_llm.engine.contexts import Joining
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ContextError, RequestError
from tiny_llm.sampling_params import OPTIONS, BeamParams, SamplingParams
from tiny_llm.server.bodies import ELSEWHERE, Sampling
from tiny_llm.server.chat_bodies import USUAL_EFFORT, Effort, Message, TemplateArguments
from tiny_llm.server.jobs import Job
from tiny_llm.server.problems import Problem, problem_of
from tiny_llm.server.settings import MAX_ANSWERS
from tiny_llm.server.strict_json import PartCount
from tiny_llm.server.text_bodies import CompletionBody, EmbeddingBody, GenerateBody
from tiny_llm.tokenizer.tokenizer import Tokenizer


def params_of(
    llm: LLM, body: Sampling, prompts: Sequence[list[int]], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """How to answer ``prompts``; without ``max_tokens``, as long as context and pool allow."""
    if body.n * len(prompts) > MAX_ANSWERS:
        what = f"{len(prompts)} prompts with n {body.n} are more than {MAX_ANSWERS} answers."
        raise Problem(400, what, code="invalid_value", param="n")
    settings = llm.engine.settings
    scheduler = settings.scheduler
    places = scheduler.max_num_seqs + scheduler.max_queued_requests
    if len(prompts) > places:
        what = f"prompt has {len(prompts)} prompts, but this server holds {places} requests at a time."
        raise Problem(400, what, code="invalid_value", param="prompt")
    given: dict[str, Any] = {name: getattr(body, name) for name in OPTIONS if name not in ELSEWHERE}
    if max_tokens is None:
        most = min(llm.max_context, settings.kv_blocks * settings.block_size)
        max_tokens = max(1, most - max(map(len, prompts)))
    given |= {"n": body.n, "logprobs": logprobs, "speculate": body.speculate, "max_tokens": max_tokens}
    if not body.use_beam_search:
        return SamplingParams(**given)
    if body.temperature == 1:  # which asks for nothing, like 0: a search draws nothing
        given["temperature"] = 0.0
    given |= {"length_penalty": body.length_penalty, "early_stopping": body.early_stopping}
    return BeamParams(width=body.n, **given)


def grammar_of(body: Sampling) -> Grammar | None:
    """What the answer must match; None if it may be anything. Raises Problem for several such wishes."""
    form = body.response_format
    asked = {
        "response_format": form and response_grammar(form.plain),
        "regex": body.regex and regex_grammar(body.regex),
        "grammar": body.grammar and lark_grammar(body.grammar),
    }
    wanted = [(name, grammar) for name, grammar in asked.items() if isinstance(grammar, Grammar)]
    if len(wanted) > 1:
        what = f"{' and '.join(name for name, _ in wanted)} were given; an answer can have one form."
        raise Problem(400, what, code="invalid_value", param=wanted[1][0])
    return wanted[0][1] if wanted else None


def job_of(
    body: Sampling,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    key_salt: str,
    grammar: Grammar | None,
    at: int = 0,
) -> Job:
    """What the engine gets; contexts stand before token ``at``. See ``salt_of``."""
    keep = getattr(body, "store", None) is not False  # one of the fields of ``neutral``
    joining = Joining(body.contexts, body.join, body.recompute, at) if body.contexts else None
    salt = salt_of(key_salt, body.cache_salt)
    return Job(prompts, params, body.priority, salt, grammar, keep=keep, joining=joining)


def salt_of(key_salt: str, own: str | None) -> str:
    """Prompts share cached blocks, and find contexts, only within one key and one salt of its own."""
    return f"{key_salt}/{own or ''}" if key_salt or own else ""


def prompts_job(llm: LLM, body: CompletionBody | GenerateBody, key_salt: str, max_tokens: int) -> Job:
    """What a request asks whose prompts are texts or ids. Raises Problem or RequestError."""
    grammar = grammar_of(body)
    prompts = prompt_ids(llm, body.prompt)
    params = params_of(llm, body, prompts, max_tokens=max_tokens, logprobs=body.logprobs)
    return job_of(body, prompts, params, key_salt, grammar)


def prompt_ids(llm: LLM, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Each prompt as ids. Raises RequestError or ContextError as ``LLM.check`` does."""
    found = []
    for number, prompt in enumerate(prompts):
        try:
            ids, _ = llm.check(prompt)
            found.append(ids)
        except RequestError as error:
            name = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
            raise _about(name, error) from error
    return found


def inputs_of(llm: LLM, body: EmbeddingBody) -> list[tuple[list[int], SamplingParams]]:
    """Each text that is to become a vector, as the engine takes it. Raises Problem."""
    how = body.prompt, body.instruction, body.dimensions
    found = []
    try:
        for text, params in llm.embedding.asked(body.input, llm.config.hidden_size, *how):
            found.append(llm.check(text, params))
    except RequestError as error:
        name = "input" if len(body.input) == 1 else f"input[{len(found)}]"
        raise _about(error.param or name, error) from error
    return found


def chat_ids(
    llm: LLM,
    messages: Sequence[Message],
    arguments: TemplateArguments,
    tools: Sequence[Mapping[str, object]] | None = None,
    effort: Effort | None = None,
    *,
    contexts: bool = False,
) -> tuple[list[int], int]:
    """A conversation as the ids of the model's template, and where among them ``contexts`` are to stand."""
    given = template_variables(llm.tokenizer, arguments, effort)
    try:
        _require_fitting(llm, messages)
        plain = [_plain(m) for m in messages]
        ids, at = llm.chat_place(plain, tools=tools, contexts=contexts, **given)
        return llm.check(ids)[0], at
    except RequestError as error:
        raise _about(error.param or "messages", error) from error


def _require_fitting(llm: LLM, messages: Sequence[Message]) -> None:
    """Raise ContextError for a conversation that cannot fit, before the work of rendering it; and Problem."""
    calls = [call.function.arguments for message in messages for call in message.tool_calls]
    llm.require_short(sum(len(message.content or "") for message in messages) + sum(map(len, calls)))
    parts = len(messages) + len(calls)
    if parts >= llm.max_context:  # each one takes a token at least
        what = f"The conversation has {parts} messages and calls, but the context holds {llm.max_context} "
        raise ContextError(what + "tokens, the answer included; shorten it.")
    count = PartCount("messages: the arguments of all calls have")
    for arguments in calls:
        count.add(arguments.encode("utf-8", "replace"))


def template_variables(
    tokenizer: Tokenizer, arguments: TemplateArguments, effort: Effort | None
) -> dict[str, object]:
    """The chat template's own variables that a request sets.

    Raises Problem for one that the template does not read, unless it asks for what the model does anyway.
    """
    given = arguments.model_dump(exclude_none=True)
    known = tokenizer.template_variables
    thinks = THINK in tokenizer.chat_template
    if "enable_thinking" not in known and given.get("enable_thinking", thinks) != thinks:
        raise _not_shown("chat_template_kwargs.enable_thinking", not thinks)
    if effort is None:
        return given
    if "reasoning_effort" in known:
        return {**given, "reasoning_effort": effort}
    if effort == "none" and "enable_thinking" in known:
        return {"enable_thinking": False, **given}
    if effort == USUAL_EFFORT or (effort == "none" and not thinks):
        return given
    raise _not_shown("reasoning_effort", effort)


def _not_shown(name: str, value: object) -> Problem:
    what = f"{name}: this model's chat template has no way to ask for {value!r}; leave it out."
    return Problem(400, what, code="unsupported", param=name)


def _about(name: str, error: RequestError) -> Problem:
    problem = problem_of(error)
    return Problem(problem.status_code, problem.detail, code=problem.code, param=name)


def _plain(message: Message) -> dict[str, object]:
    """A message as templates take it; the developer is the system's new name, a refusal is what was said."""
    plain = message.model_dump(exclude_none=True, exclude_defaults=True)
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    role = "system" if message.role == "developer" else message.role
    return {**plain, "role": role, "content": message.content or message.refusal or ""}
