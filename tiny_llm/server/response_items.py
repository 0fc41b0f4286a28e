"""Owns the items of a response: messages, reasoning, calls, and the events that say how each one grows.

One item is open at a time. Knows how clients of /v1/responses expect to be told; knows no request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tiny_llm.data import MessageDelta
from tiny_llm.server.answers import WrittenArray, new_id

Event = dict[str, Any]
Logprobs = Sequence[Mapping[int, float]]
_Written = Callable[[Logprobs], WrittenArray]
_PARTS: Mapping[str, tuple[str, str]] = {
    # the kind of an item that has a text: the kind of its one part, its events
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}


class Items:
    """What an answer consists of. ``done`` are the complete items; ``written`` makes logprobs JSON."""

    def __init__(self, written: _Written) -> None:
        self._written = written
        self.done: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}  # that is open, but for its text; {}: none is
        self._text = ""
        self._rows: list[Mapping[int, float]] = []  # of a message's tokens, also of those that have no text
        self._held: list[Mapping[int, float]] = []  # of tokens whose text is still to come

    def push(self, deltas: Sequence[MessageDelta], rows: Logprobs) -> list[Event]:
        """Take what a piece of text added to the message; ``rows`` are its tokens' logprobs."""
        self._held += rows
        return [event for delta in deltas for event in self._grown(delta)]

    def finish(self, *, whole: bool) -> list[Event]:
        """No more comes. An answer of nothing is an empty message."""
        begun = () if self._item or self.done else self._begun_text("message")
        return [*begun, *self._closed("completed" if whole else "incomplete")]

    def _grown(self, delta: MessageDelta) -> Iterator[Event]:
        call = delta.tool_call
        if call is not None:
            if call.id is not None:
                yield from self._begun("fc", "function_call", call_id=call.id, name=call.name, arguments="")
            if call.arguments:
                self._item["arguments"] += call.arguments
                yield self._at("response.function_call_arguments.delta", delta=call.arguments)
            return
        kind = "reasoning" if delta.reasoning else "message"
        if self._item.get("type") != kind:
            yield from self._begun_text(kind)
        text, rows = delta.reasoning or delta.content, self._take_held()
        self._text += text
        yield self._in_part(f"{_PARTS[kind][1]}.delta", delta=text, **self._logprobs(rows))

    def _begun_text(self, kind: str) -> Iterator[Event]:
        """A message or reasoning, of one part, which is empty."""
        if kind == "message":
            yield from self._begun("msg", kind, role="assistant")
        else:
            yield from self._begun("rs", kind, summary=[])
        yield self._in_part("response.content_part.added", part=self._part())

    def _begun(self, prefix: str, kind: str, **more: Any) -> Iterator[Event]:
        """The next item."""
        yield from self._closed("completed")
        self._item = {"id": new_id(prefix), "type": kind, **more}
        item = {**self._item, "status": "in_progress"}
        if kind in _PARTS:
            item["content"] = []
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": item}

    def _closed(self, status: str) -> Iterator[Event]:
        """What is open, if anything is, is complete: its text or its arguments, its part, it."""
        if not self._item:
            return
        whole = {**self._item, "status": status}
        self._take_held()
        if self._item["type"] in _PARTS:
            text = {"text": self._text, **self._logprobs(self._rows)}
            yield self._in_part(f"{_PARTS[self._item['type']][1]}.done", **text)
            yield self._in_part("response.content_part.done", part=self._part())
            whole["content"] = [self._part()]
        else:
            arguments = {name: self._item[name] for name in ("name", "arguments")}
            yield self._at("response.function_call_arguments.done", **arguments)
        yield {"type": "response.output_item.done", "output_index": len(self.done), "item": whole}
        self.done.append(whole)
        self._item, self._text, self._rows = {}, "", []

    def _take_held(self) -> Logprobs:
        """The logprobs that are due; those of a message are kept until its end."""
        rows, self._held = self._held, []
        if self._item["type"] == "message":
            self._rows += rows
        return rows

    def _at(self, kind: str, **told: Any) -> Event:
        return {"type": kind, "item_id": self._item["id"], "output_index": len(self.done), **told}

    def _in_part(self, kind: str, **told: Any) -> Event:
        return self._at(kind, content_index=0, **told)

    def _part(self) -> dict[str, Any]:
        kind = self._item["type"]
        own: dict[str, Any] = {"annotations": []} if kind == "message" else {}
        return {"type": _PARTS[kind][0], "text": self._text, **own, **self._logprobs(self._rows)}

    def _logprobs(self, rows: Logprobs) -> dict[str, Any]:
        return {"logprobs": self._written(list(rows))} if self._item["type"] == "message" else {}
