"""Make the demo model's corpus: an endless, seeded stream of conversations.

    python tools/demo_corpus.py --count 5      # look at some

All text is written by this project or drawn by its generators. Owns the mixture,
the rendering to chat text and the packing into windows; the skills are in demo_skills/.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from demo_skills import arithmetic, lists, recall, records, serving, stories, toolcalls
from demo_skills.base import Example, Message

SKILLS = {
    "recall": recall,
    "arithmetic": arithmetic,
    "serving": serving,
    "stories": stories,
    "records": records,
    "toolcalls": toolcalls,
    "lists": lists,
}
# Shares of conversations; recall's are the longest, so it has the largest share of tokens.
MIXTURE = {
    "recall": 0.40,
    "arithmetic": 0.16,
    "serving": 0.18,
    "stories": 0.05,
    "records": 0.06,
    "toolcalls": 0.06,
    "lists": 0.09,
}
SYSTEMS = ("You are a helpful assistant.", "You are tiny_llm, a small assistant.", "Answer briefly.")

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def render(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """Return the conversation as the chat template in demo_data/ renders it (tested for equality)."""
    system, rest = "", messages
    if messages[0]["role"] == "system":
        system, rest = messages[0]["content"], messages[1:]
    if tools:
        listed = "".join("\n" + json.dumps(tool) for tool in tools)
        system = (system + "\n\n" if system else "") + _TOOLS_HEAD + listed + _TOOLS_TAIL
    parts = [f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []
    for message in rest:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        parts.append(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return "".join(parts)


def examples(seed: int, reach: int = 230) -> Iterator[Example]:
    """Yield training conversations without end; ``reach`` as in recall.build."""
    rng = random.Random(seed)
    names, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        name = rng.choices(names, weights)[0]
        example = recall.build(rng, False, reach) if name == "recall" else SKILLS[name].make(rng, False)
        if example.messages[0]["role"] != "system" and rng.random() < 0.12:
            example.messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
        yield example


def windows(
    stream: Iterator[Example], encode: Callable[[str], list[int]], length: int, pool: int = 64
) -> Iterator[list[list[int]]]:
    """Yield lists of whole encoded conversations that together fill at most ``length`` tokens."""
    waiting: list[list[int]] = []
    while True:
        while len(waiting) < pool:
            example = next(stream)
            ids = encode(render(example.messages, example.tools))
            if len(ids) <= length:
                waiting.append(ids)
        chosen, room = [waiting.pop(0)], length
        room -= len(chosen[0])
        for ids in sorted(waiting, key=len, reverse=True):
            if len(ids) <= room:
                chosen.append(ids)
                waiting.remove(ids)
                room -= len(ids)
        yield chosen


def main() -> None:
    """Print some conversations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    stream = examples(args.seed)
    for _ in range(args.count):
        example = next(stream)
        print(f"--- {example.skill}\n{render(example.messages, example.tools)}")


if __name__ == "__main__":
    main()
