"""Owns ``python main.py generate``: the answer to one prompt, or to each of a file's."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

from tiny_llm.chat.chat import figures
from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import load
from tiny_llm.commands.offline import answer_file
from tiny_llm.commands.talking import ANSWER, SystemOption, messages_of, print_stream, read_stdin, row_of
from tiny_llm.errors import RequestError
from tiny_llm.memory import peak_memory_bytes
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app, option
from tiny_llm.sampling_params import SamplingParams

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
