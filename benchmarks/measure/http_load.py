"""A client that costs little: bare connections, one thread, and nothing read into until all is over.

It shares the machine with the server that it measures. So a read is a time and some bytes, kept; chunks,
events and JSON are taken apart afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from measure.serving import Asked

Read = tuple[float, bytes]
PATIENCE_S = 300.0
PATHS = ("/v1/completions", "/v1/chat/completions", "/generate")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask: an OpenAI server's address, its model's name, perhaps a key.

    ``path`` is one of ``PATHS``; the last is ours alone, and tells the engine's own time to the first token.
    """

    url: str
    model: str
    key: str = ""
    path: str = PATHS[0]

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def request(self, prompt: str, most: int, more: Mapping[str, object]) -> bytes:
        """A whole HTTP request for a stream of exactly ``most`` tokens, where that can be demanded."""
        asked: dict[str, object] = {"model": self.model, "max_tokens": most, "stream": True, "temperature": 0}
        asked |= {"ignore_eos": True, **more}
        chat = "chat" in self.path
        asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        asked |= {"stream_options": {"include_usage": True}} if self.path != PATHS[-1] else {}
        body = json.dumps(asked).encode()
        path = urlsplit(self.url).path.rstrip("/") + self.path
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        host, port = self.place
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n{key}"
        return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One request, and all that came back until the server hung up. ``seen`` is told of each read."""

    def __init__(self, request: bytes, seen: Callable[[Connection], None] | None = None) -> None:
        self.reads: list[Read] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._request = request
        self._seen = seen

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask at once."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self.reads.append((time.perf_counter(), data))
        if self._seen is not None:
            self._seen(self)

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        if not self.ended.done():
            self.ended.set_result(time.perf_counter())


async def ask(
    target: Target, asked: Asked, request: bytes, seen: Callable[[Connection], None] | None = None
) -> Connection | None:
    """One request from beginning to end. None, with the reason in ``asked``, without a connection."""
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(lambda: Connection(request, seen), *target.place)
        asked.ended = await asyncio.wait_for(connection.ended, PATIENCE_S)
    except (OSError, TimeoutError) as error:
        asked.error = f"{type(error).__name__}: {error}"
        return None
    return connection


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a run: its seconds, and the part of a core that this client took."""

    seconds: float
    client_share: float


def run(target: Target, requests: Sequence[tuple[Asked, bytes]], streams: int | None) -> Load:
    """Send all: ``streams`` at a time, or each when it is due where that is None. Fills in ``Asked``."""
    connections: list[Connection | None] = [None] * len(requests)
    following = iter(range(len(requests)))

    async def one(number: int) -> None:
        connections[number] = await ask(target, *requests[number])

    async def stream() -> None:
        for number in following:
            requests[number][0].began = time.perf_counter()
            await one(number)

    async def due(number: int, began: float) -> None:
        asked = requests[number][0]
        asked.began = began + asked.at
        await asyncio.sleep(max(0.0, asked.began - time.perf_counter()))
        await one(number)

    async def all_of_them() -> None:
        began = time.perf_counter()
        if streams is None:
            await asyncio.gather(*(due(number, began) for number in following))
        else:
            await asyncio.gather(*(stream() for _ in range(streams)))

    began, busy = time.perf_counter(), time.process_time()
    asyncio.run(all_of_them())
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    for (asked, _), connection in zip(requests, connections, strict=True):
        if connection is not None:
            read(asked, connection.reads)
    return Load(seconds, busy / seconds)


def read(asked: Asked, reads: Sequence[Read]) -> None:
    """Take an answer apart: when text came, how many tokens the server counted, what went wrong."""
    head, pieces = _body(reads)
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        asked.error = (head.split(b"\r\n", 1)[0] + b" " + b"".join(data for _, data in pieces)).decode()[:300]
        return
    ends = ""
    for at, event in _events(pieces):
        if event == b"[DONE]":
            continue
        told = json.loads(event)
        if "error" in told:
            asked.error = str(told["error"])
            return
        usage = told.get("usage") or {}
        asked.tokens = usage.get("completion_tokens", asked.tokens)
        asked.prompt_tokens = usage.get("prompt_tokens", asked.prompt_tokens)
        asked.engine_ttft_s = told.get("ttft_s", asked.engine_ttft_s)
        for choice in told.get("choices", (told,)):
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                asked.came.append(at)
            ends = choice.get("finish_reason") or ends
    if not ends or not asked.came:
        asked.error = "the stream broke off" if not ends else "there was no text"


def _body(reads: Sequence[Read]) -> tuple[bytes, list[Read]]:
    """A response's head, and its body without the chunks' frames."""
    head, raw = b"", []
    for number, (at, data) in enumerate(reads):
        head += data
        if b"\r\n\r\n" in head:
            head, rest = head.split(b"\r\n\r\n", 1)
            raw = [(at, rest), *reads[number + 1 :]]
            break
    return head, list(_dechunked(raw)) if b"transfer-encoding: chunked" in head.lower() else raw


def _dechunked(reads: Sequence[Read]) -> Iterator[Read]:
    held = b""
    for at, data in reads:
        held += data
        while b"\r\n" in held:
            size, rest = held.split(b"\r\n", 1)
            length = int(size.split(b";")[0], 16)
            if len(rest) < length + 2:
                break
            yield at, rest[:length]
            held = rest[length + 2 :]


def _events(pieces: Sequence[Read]) -> Iterator[Read]:
    """The data of each event, and when its end came."""
    held = b""
    for at, data in pieces:
        held += data.replace(b"\r\n", b"\n")
        while b"\n\n" in held:
            event, held = held.split(b"\n\n", 1)
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield at, b"\n".join(lines)
