"""Owns the items of a response: messages, reasoning, calls, and the events that say how each one grows.

One item is open at a time. Knows how clients of /v1/responses expect to be told; knows no request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tiny_llm.data import MessageDelta, ToolCallDelta
from tiny_llm.server.answers import WrittenArray, new_id

Event = dict[str, Any]
Logprobs = Sequence[Mapping[int, float]]
_Written = Callable[[Logprobs], WrittenArray]
_PARTS: Mapping[str, tuple[str, str, str]] = {
    # a message's field: the kind of item that it is a part of, the kind of its part, its event
    "content": ("message", "output_text", "response.output_text"),
    "reasoning": ("reasoning", "reasoning_text", "response.reasoning_text"),
}


class Items:
    """What an answer consists of. ``done`` are the complete items; ``written`` makes logprobs JSON."""

    def __init__(self, written: _Written) -> None:
        self._written = written
        self.done: list[dict[str, Any]] = []
        self._open: _Text | _Call | None = None
        self._rows: list[Mapping[int, float]] = []  # of tokens whose text is still to come

    def push(self, deltas: Sequence[MessageDelta], rows: Logprobs) -> list[Event]:
        """Take what a piece of text added to the message; ``rows`` are its tokens' logprobs."""
        self._rows += rows
        return [event for delta in deltas for event in self._grown(delta)]

    def finish(self, *, whole: bool) -> list[Event]:
        """No more comes. An answer of nothing is an empty message."""
        is_empty = self._open is None and not self.done
        begun = self._begun(lambda index: _Text(index, "content", self._written)) if is_empty else ()
        return [*begun, *self._closed("completed" if whole else "incomplete")]

    def _grown(self, delta: MessageDelta) -> Iterator[Event]:
        call = delta.tool_call
        if call is not None:
            if call.id is not None:
                yield from self._begun(lambda index: _Call(index, call))
            assert isinstance(self._open, _Call), "a call's first delta has its id"
            if call.arguments:
                yield self._open.grow(call.arguments)
            return
        name = "reasoning" if delta.reasoning else "content"
        if not isinstance(self._open, _Text) or self._open.name != name:
            yield from self._begun(lambda index: _Text(index, name, self._written))
        assert isinstance(self._open, _Text)
        rows, self._rows = self._rows, []
        yield self._open.grow(delta.reasoning or delta.content, rows)

    def _begun(self, make: Callable[[int], _Text | _Call]) -> Iterator[Event]:
        """The next item; ``make`` is told its place."""
        yield from self._closed("completed")
        self._open = make(len(self.done))
        yield from self._open.begin()

    def _closed(self, status: str) -> Iterator[Event]:
        item, self._open = self._open, None
        if item is None:
            return
        if isinstance(item, _Text):
            item.keep(self._rows)  # of tokens that have no text, as the one that ends the answer
        self._rows = []
        yield from item.end(status)
        self.done.append(item.told(status))


class _Item:
    """One item as it grows; ``place`` says in its events which one it is."""

    def __init__(self, index: int, prefix: str, **item: Any) -> None:
        self._item = {"id": new_id(prefix), **item}
        self.place = {"item_id": self._item["id"], "output_index": index}

    def begin(self) -> Iterator[Event]:
        """It is there, and empty."""
        yield self._event("response.output_item.added", self.told("in_progress"))

    def end(self, status: str) -> Iterator[Event]:
        """It is complete."""
        yield self._event("response.output_item.done", self.told(status))

    def told(self, status: str) -> dict[str, Any]:
        """As it is now."""
        return {**self._item, "status": status}

    def _event(self, kind: str, item: Mapping[str, Any]) -> Event:
        return {"type": kind, "output_index": self.place["output_index"], "item": item}


class _Text(_Item):
    """A message or reasoning, of one part."""

    def __init__(self, index: int, name: str, written: _Written) -> None:
        self.name = name
        self._written = written
        kind, self._part_kind, self._event_name = _PARTS[name]
        if name == "content":
            super().__init__(index, "msg", type=kind, role="assistant")
        else:
            super().__init__(index, "rs", type=kind, summary=[])
        self._at = {**self.place, "content_index": 0}
        self._text = ""
        self._rows: list[Mapping[int, float]] = []

    def begin(self) -> Iterator[Event]:
        """It is there, with a part that is empty."""
        yield self._event("response.output_item.added", {**self.told("in_progress"), "content": []})
        yield {"type": "response.content_part.added", **self._at, "part": self._part()}

    def grow(self, text: str, rows: Logprobs) -> Event:
        """Some more of it."""
        self._text += text
        self.keep(rows)
        return {"type": f"{self._event_name}.delta", **self._at, "delta": text, **self._logprobs(rows)}

    def keep(self, rows: Logprobs) -> None:
        """Log-probabilities of its tokens, also of those that have no text."""
        self._rows += rows if self.name == "content" else []

    def end(self, status: str) -> Iterator[Event]:
        """Its text is complete, its part is, it is."""
        whole = {"text": self._text, **self._logprobs(self._rows)}
        yield {"type": f"{self._event_name}.done", **self._at, **whole}
        yield {"type": "response.content_part.done", **self._at, "part": self._part()}
        yield from super().end(status)

    def told(self, status: str) -> dict[str, Any]:
        """As it is now."""
        return {**super().told(status), "content": [self._part()]}

    def _part(self) -> dict[str, Any]:
        own: dict[str, Any] = {"annotations": []} if self.name == "content" else {}
        return {"type": self._part_kind, "text": self._text, **own, **self._logprobs(self._rows)}

    def _logprobs(self, rows: Logprobs) -> dict[str, Any]:
        return {"logprobs": self._written(list(rows))} if self.name == "content" else {}


class _Call(_Item):
    """A call of a function."""

    def __init__(self, index: int, call: ToolCallDelta) -> None:
        super().__init__(index, "fc", type="function_call", call_id=call.id, name=call.name, arguments="")

    def grow(self, arguments: str) -> Event:
        """Some more of its arguments."""
        self._item["arguments"] += arguments
        return {"type": "response.function_call_arguments.delta", **self.place, "delta": arguments}

    def end(self, status: str) -> Iterator[Event]:
        """Its arguments are complete, it is."""
        whole = {name: self._item[name] for name in ("name", "arguments")}
        yield {"type": "response.function_call_arguments.done", **self.place, **whole}
        yield from super().end(status)
