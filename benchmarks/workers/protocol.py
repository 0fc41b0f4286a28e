"""How a benchmark talks to the engines that it compares: one line of JSON in, one line out.

A worker is a process that keeps one engine and its weights, so that rounds of several engines can be
interleaved. It runs in its engine's own environment, hence only the standard library here. Requests:

    {"do": "load", "shape": "qwen2-0.5b", "config": {...}, "threads": 2, "folder": "..."}
                                                                     -> {"settings": [...], ...}
    {"do": "open", "rows": 1, "room": 640}                           -> {}
    {"do": "prefill", "setting": "...", "tokens": 512}               -> {"seconds": ...}
    {"do": "decode", "setting": "...", "context": 512, "steps": 16}  -> {"seconds": ...}
    {"do": "streams", "setting": "...", "rows": 8, "context": 128, "steps": 64}  -> {"seconds": ...}
    {"do": "answer", "setting": "...", "prompt": [5, 7], "tokens": 64}
                                                     -> {"answer": [...], "seconds": ..., "steps": ...}
    {"do": "figures"}                                                -> {...}

``shape`` is a short name of ours and ``config`` the facts of its config.json, ``folder`` where made weights
may be kept. ``open`` says how many sequences there will be and how many tokens each may have. ``prefill`` is
one sequence of so many tokens, from none to the last one's logits. ``decode`` is so many greedy steps of one
token a sequence, after ``context`` tokens that are in the cache already (making them is not timed).
``streams``, which not every engine has, is so many prompts of ``context`` tokens that come at once, until
each has ``steps`` tokens. ``answer``, for engines that guess, is the greedy answer to a prompt, with the
seconds and steps from its first token to its last. ``figures`` is what an engine says of what it did last,
perhaps nothing. A failure is {"error": "..."}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO

Config = Mapping[str, object]


class Engine(Protocol):
    """What a worker serves. ``settings`` are the ways of running that are worth comparing."""

    @property
    def settings(self) -> Sequence[str]:
        """Their names, one at least."""
        ...

    @property
    def about(self) -> Mapping[str, object]:
        """What a report should say: version, weight bytes ..."""
        ...

    def open(self, rows: int, room: int) -> None:
        """Make empty caches for ``rows`` sequences of at most ``room`` tokens."""
        ...

    def prefill(self, setting: str, tokens: int) -> float:
        """Seconds for one sequence's first ``tokens`` tokens."""
        ...

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Seconds for ``steps`` tokens more in each sequence."""
        ...


class Load(Protocol):
    """An engine's constructor."""

    def __call__(self, shape: str, config: Config, threads: int, folder: str) -> Engine: ...


def serve(load: Load) -> None:
    """Answer requests from standard input until it ends."""
    answers = _own_stdout()
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                engine = load(request["shape"], request["config"], request["threads"], request["folder"])
                answer: Mapping[str, object] = {"settings": list(engine.settings), **engine.about}
            else:
                assert engine is not None, "load comes first"
                answer = _answer(engine, request)
        except Exception as error:  # whatever a peer raises is reported, not guessed at
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(engine: Engine, request: Mapping[str, object]) -> Mapping[str, object]:
    arguments = {name: value for name, value in request.items() if name != "do"}
    if request["do"] == "open":
        engine.open(**arguments)  # type: ignore[arg-type]
        return {}
    if request["do"] == "figures":
        return dict(getattr(engine, "figures", {}))
    if request["do"] == "answer":
        return engine.answer(**arguments)  # type: ignore[attr-defined, no-any-return]
    assert request["do"] in ("prefill", "decode", "streams")
    return {"seconds": getattr(engine, str(request["do"]))(**arguments)}


def _own_stdout() -> TextIO:
    """Keep standard output for answers; what an engine prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
