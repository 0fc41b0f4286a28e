"""Owns ``python main.py generate``: the answer to one prompt, or to each of a file's.

Of a file: a JSON object a line in, one a line out, as each is done. Input keys: ``prompt`` (text) or
``messages``, and any of ``SETTABLE`` for that line alone. Output keys: ``line`` (from 1), and those of a
completion.
"""

from __future__ import annotations

import json
import json as json_format
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tiny_llm.chat.chat import figures
from tiny_llm.commands.bar import Bar
from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import load
from tiny_llm.commands.talking import ANSWER, SystemOption, messages_of, print_stream, read_stdin, row_of
from tiny_llm.engine.llm import LLM
from tiny_llm.engine.trace import Trace
from tiny_llm.errors import RequestError
from tiny_llm.memory import peak_memory_bytes
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app, option
from tiny_llm.sampling_params import OPTIONS, SamplingParams

SETTABLE = tuple(name for name in OPTIONS if name != "prompt_logprobs")  # a completion does not carry those
Asked = tuple[int, list[int], SamplingParams]  # a line's number, its prompt as ids, and its params


def answer_file(
    llm: LLM, path: Path, params: SamplingParams, *, system: str | None, raw: bool, trace: Path | None = None
) -> None:
    """Print an answer for each line of ``path``, as they end; a progress bar on stderr in a terminal.

    ``trace``: where a timeline of all steps is written.

    Raises RequestError with the line's number before anything runs if one of them is invalid.
    """
    print(llm.memory, file=sys.stderr)
    asked = list(_read(llm, path, params, system, raw))
    total = sum(own.n for _, _, own in asked)
    bar = Bar("Answered")
    began, tokens = time.perf_counter(), 0
    llm.engine.trace = Trace() if trace is not None else None
    answers = llm.answers((ids, own) for _, ids, own in asked)
    for done, (index, completion) in enumerate(answers, 1):
        tokens += len(completion.token_ids)
        rate = tokens / (time.perf_counter() - began)
        bar.close()  # stdout may be the same terminal
        about = {"error": completion.error, "cached_tokens": completion.cached_tokens}
        print(json.dumps({"line": asked[index][0], **row_of(completion), **about}), flush=True)
        bar.show(done / total, f"{done} of {total}, {rate:.0f} tok/s")
    bar.close()
    seconds = time.perf_counter() - began
    if llm.engine.trace is not None and trace is not None:
        llm.engine.trace.save(trace)
    print(
        f"{len(asked)} prompts · {tokens} tokens in {seconds:.1f} s · {tokens / seconds:.0f} tok/s",
        file=sys.stderr,
    )


def _read(llm: LLM, path: Path, params: SamplingParams, system: str | None, raw: bool) -> Iterator[Asked]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not valid UTF-8 at byte {error.start}; convert it first.") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 too, within a text
        if line.strip():
            try:
                yield number, *_request(llm, line, params, system, raw)
            except (RequestError, json.JSONDecodeError, TypeError) as error:
                raise RequestError(f"{path}, line {number}: {error}") from error


def _request(
    llm: LLM, line: str, params: SamplingParams, system: str | None, raw: bool
) -> tuple[list[int], SamplingParams]:
    given = json.loads(line)
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        raise RequestError('expected an object with "prompt" or "messages".')
    unknown = given.keys() - {"prompt", "messages", *SETTABLE}
    if unknown:
        raise RequestError(f"{min(unknown)!r} is unknown; a line may set {', '.join(SETTABLE)}.")
    own = replace(params, **{name: given[name] for name in SETTABLE if name in given})
    if raw and "prompt" in given:
        return llm.check(given["prompt"], own)
    messages = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return llm.check(llm.chat_prompt(messages), own)


app = command_app()


@app.command()
@grouped("prompt_logprobs")
def generate(
    prompt: Annotated[
        str | None, option("Prompt", "The text; without it, what is piped in.", "--prompt", "-p")
    ] = None,
    file: Annotated[
        Path | None,
        option("Prompt", 'Many prompts: {"prompt": "..."} a line; a line back as each ends.', "--file"),
    ] = None,
    trace: Annotated[
        Path | None, option("Output", "With --file: write a timeline that Perfetto (ui.perfetto.dev) opens.")
    ] = None,
    raw: Annotated[
        bool, option("Prompt", "Go on with the text as it is: no chat template.", "--raw")
    ] = False,
    system: SystemOption = None,
    params: SamplingParams = ANSWER,
    options: EngineOptions = ENGINE,
    json: Annotated[
        bool, option("Output", "Print one line an answer: the text and its figures.", "--json")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Answer one prompt, or each of a file's.

    The answer goes to stdout as it is made, its figures to stderr at the end.
    """
    if file is not None and prompt is not None:
        raise RequestError("--file and --prompt were both given; give one of them.")
    if raw and system is not None:
        raise RequestError("--system needs the chat template, which --raw leaves out; give one of them.")
    if file is not None:
        return answer_file(load(options), file, params, system=system, raw=raw, trace=trace)
    if not json and (params.n > 1 or params.logprobs is not None):
        raise RequestError("--n and --logprobs need --json or --file: plain text shows one answer alone.")
    text = read_stdin() if prompt is None else prompt
    messages = [] if raw else messages_of(system, text)
    llm = load(options)
    chunks = llm.stream(text, params) if raw else llm.stream_chat(messages, params)
    if not json:
        print(figures(print_stream(chunks)), file=sys.stderr)
        return
    answers = [chunk.completion for chunk in chunks if chunk.completion is not None]
    for answer in sorted(answers, key=lambda answer: answer.index):
        speed = {
            "prefill_tok_s": round(answer.timing.prefill_tok_s, 3),
            "decode_tok_s": round(answer.timing.decode_tok_s, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        # One line whatever the text holds: json escapes all that is not ASCII.
        print(json_format.dumps({"model": options.model, **row_of(answer), **speed}))
