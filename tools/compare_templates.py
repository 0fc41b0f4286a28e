"""Published chat templates rendered by us and by transformers: a table, and an error where they disagree.

    make templates                                  # fetches the templates below from the hub
    python tools/compare_templates.py FOLDER        # or takes each FOLDER/*.jinja

A cell is one conversation before one template:

    =   we show what transformers shows, of the ways to write the conversation that show all of it
    +   we show it whole, transformers in no way: calls one by one, text apart from its calls
    -   refused by us, and transformers shows it whole in no way
    !   anything else

transformers is given a past call in each way that templates want it (arguments as an object or as text,
content "" or none, ids of nine characters); we are given it as OpenAI's clients write it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers.utils.chat_template_utils import render_jinja_template

from tiny_llm.errors import TinyLLMError
from tiny_llm.messages.call_form import short_id
from tiny_llm.messages.chat_prompt import ChatPrompts
from tiny_llm.tokenizer.files import TokenizerFiles
from tiny_llm.tokenizer.tokenizer import Tokenizer

PUBLISHED = (
    "01-ai/Yi-1.5-6B-Chat",
    "deepseek-ai/DeepSeek-R1",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-V3.1",
    "deepseek-ai/deepseek-coder-1.3b-instruct",
    "HuggingFaceH4/zephyr-7b-beta",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM3-3B",
    "ibm-granite/granite-3.3-2b-instruct",
    "LiquidAI/LFM2-1.2B",
    "meetkai/functionary-small-v3.2",
    "microsoft/Phi-3-mini-4k-instruct",
    "microsoft/Phi-4-mini-instruct",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "moonshotai/Kimi-K2-Instruct",
    "NousResearch/Hermes-2-Pro-Llama-3-8B",
    "NousResearch/Hermes-3-Llama-3.1-8B",
    "openai/gpt-oss-20b",
    "Qwen/QwQ-32B",
    "Qwen/Qwen1.5-0.5B-Chat",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-4B-Thinking-2507",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "unsloth/Llama-3.2-1B-Instruct",
    "unsloth/Meta-Llama-3.1-8B-Instruct",
    "unsloth/gemma-2-2b-it",
    "zai-org/GLM-4.5-Air",
)
"""Of each family and each of its ways; those that anyone may read."""

Message = Mapping[str, Any]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
USER, MORE = {"role": "user", "content": "zqask"}, {"role": "user", "content": "zqmore"}
SYSTEM, ANSWER = {"role": "system", "content": "zqrule"}, {"role": "assistant", "content": "zqsaid"}
PARAMETERS = {"type": "object", "properties": {"zqkey": {"type": "string", "description": "A key."}}}
TOOL = {"name": "zqtool", "description": "A tool.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TOOL}]


def calling(*numbers: int, content: str | None = None) -> Message:
    """The assistant's message with those calls."""
    calls = [
        {
            "id": f"call-{number:032x}",
            "type": "function",
            "function": {"name": f"zqname{number}", "arguments": json.dumps({f"zqkey{number}": "zqvalue"})},
        }
        for number in numbers
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(number: int) -> Message:
    """What a call returned."""
    return {"role": "tool", "tool_call_id": f"call-{number:032x}", "content": f"zqresult{number}"}


CONVERSATIONS: Mapping[str, Sequence[Message]] = {
    "ask": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, MORE],
    "tools": [USER],
    "call": [USER, calling(1), result(1)],
    "answered": [USER, calling(1), result(1), ANSWER, MORE],
    "two calls": [USER, calling(1, 2), result(1), result(2)],
    "text too": [USER, calling(1, content="zqtext"), result(1), ANSWER, MORE],
}
WITHOUT_TOOLS = ("ask", "system", "turns")
"""The others have tools; calls are shown without where the template shows none (DeepSeek's first ones)."""


def words(value: object) -> Iterator[str]:
    """All that a conversation says, which a prompt must show."""
    if isinstance(value, str):
        if value.startswith("{"):
            yield from words(json.loads(value))
        elif value.startswith("zq"):
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from words(name)
            yield from words(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from words(item)


def written(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation in each way that templates want it."""
    for as_text, content, short in product((False, True), ("", None), (False, True)):
        names: dict[str, str] = {}
        ways: list[Message] = []
        for message in messages:
            way = dict(message)
            if "tool_calls" in way:
                names |= {call["id"]: call["function"]["name"] for call in way["tool_calls"]}
                way["content"] = way["content"] or content
                way["tool_calls"] = [written_call(call, as_text, short) for call in way["tool_calls"]]
            elif way["role"] == "tool":
                call_id = way["tool_call_id"]
                way |= {"name": names[call_id], "tool_call_id": short_id(call_id) if short else call_id}
            ways.append(way)
        yield ways


def written_call(call: Message, as_text: bool, short: bool) -> Message:
    """One of its calls."""
    arguments = call["function"]["arguments"]
    function = {**call["function"], "arguments": arguments if as_text else json.loads(arguments)}
    return {**call, "id": short_id(call["id"]) if short else call["id"], "function": function}


def theirs(source: str, messages: Sequence[Message], tools: Sequence[Message] | None) -> set[str]:
    """What transformers makes of the conversation, written in each way: the renderings that show all of it.

    A call shown as JSON is better than one shown as a JSON string with JSON in it.
    """
    shown = set()
    wanted = set(words(messages)) | ({"zqtool"} if tools else set())
    for way in written(messages):
        given = {"tools": tools, "add_generation_prompt": True, **SPECIALS}
        try:
            [text], _ = render_jinja_template([way], chat_template=source, **given)
        except Exception:  # whatever a template raises
            continue
        if all(word in text for word in wanted):
            shown.add(text)
    return {text for text in shown if '\\"zq' not in text} or shown


def ours(prompts: ChatPrompts, messages: Sequence[Message], tools: Sequence[Message] | None) -> str | None:
    """What we make of it; None where we refuse."""
    try:
        return prompts.text(messages, tools=tools)
    except TinyLLMError:
        return None


def verdict(prompts: ChatPrompts, source: str, name: str) -> str:
    """The cell of one conversation."""
    messages = CONVERSATIONS[name]
    has_tools = name == "tools" or (name not in WITHOUT_TOOLS and theirs(source, [USER], TOOLS))
    tools = TOOLS if has_tools else None
    expected, shown = theirs(source, messages, tools), ours(prompts, messages, tools)
    if shown is None:
        return "!" if expected else "-"
    if expected:
        return "=" if shown in expected else "!"
    return "+" if all(word in shown for word in words(messages)) else "!"


def in_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """The templates of a folder: name and source."""
    for path in sorted(folder.glob("*.jinja")):
        yield path.stem, path.read_text("utf-8")


UNREACHABLE = (httpx2.TransportError, ConnectionError)
"""The hub's silence, and huggingface_hub told to be offline: no other template would come either."""
HUB_SECONDS = 10.0


def from_hub() -> Iterator[tuple[str, str]]:
    """The published templates: name and source. What cannot be had is said on stderr.

    Raises UNREACHABLE.
    """
    for repo_id in PUBLISHED:
        try:
            yield repo_id, fetched(repo_id)
        except UNREACHABLE:
            raise
        except (OSError, ValueError, KeyError) as error:
            print(f"{repo_id}: {type(error).__name__}: {str(error).strip()[:200]}", file=sys.stderr)


def fetched(repo_id: str) -> str:
    """The template that is taken with tools, from the file of its own or from the tokenizer's."""
    info = huggingface_hub.model_info(repo_id, timeout=HUB_SECONDS)  # asks once, unlike list_repo_files
    files = {file.rfilename for file in info.siblings or []}
    if "chat_template.jinja" in files:
        path = huggingface_hub.hf_hub_download(repo_id, "chat_template.jinja")
        return Path(path).read_text("utf-8")
    path = huggingface_hub.hf_hub_download(repo_id, "tokenizer_config.json")
    template = json.loads(Path(path).read_text("utf-8"))["chat_template"]
    if isinstance(template, str):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    return str(named.get("tool_use", named["default"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if there is anything wrong in it, or if it is empty."""
    parser = argparse.ArgumentParser(
        description="Our rendering of published chat templates, and transformers'"
    )
    parser.add_argument("folder", type=Path, nargs="?", help="take *.jinja from here, and ask no network")
    folder = parser.parse_args(arguments).folder
    try:
        counts = print_table(in_folder(folder) if folder else from_hub())
    except UNREACHABLE as error:
        hub, why = huggingface_hub.constants.ENDPOINT, f"{type(error).__name__}: {error}".split("\n")[0]
        what = "Where there is no network, give a folder of *.jinja: make templates TEMPLATES=folder"
        print(f"error: {hub} cannot be reached ({why}). {what}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} {cell}" for cell, count in counts.items()))
    return int(counts["!"] > 0 or not any(counts.values()))


def print_table(templates: Iterable[tuple[str, str]]) -> dict[str, int]:
    """A row for each; returns how often each cell was there."""
    counts = dict.fromkeys("=+-!", 0)
    for number, (template, source) in enumerate(templates):
        if number == 0:
            print(" ".join([*(f"{name:>9}" for name in CONVERSATIONS), " template"]))
        files = TokenizerFiles(Backend(models.BPE()), SPECIALS, {"default": source}, add_bos=None)
        prompts = ChatPrompts(Tokenizer(files))
        cells = [verdict(prompts, source, name) for name in CONVERSATIONS]
        for cell in cells:
            counts[cell] += 1
        print(" ".join([*(f"{cell:>9}" for cell in cells), f" {template}"]), flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(main())
