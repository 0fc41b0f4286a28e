"""Owns the tools of MCP servers: programs that talk on stdin and stdout, by the package `mcp`.

A server is a program of the user's choice, with the user's rights and network. Of its tools only those run
that the user names; each call is an effect, and what it says of itself or answers is data.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tiny_llm.agent.action import AgentTool, Outcome, Prepared
from tiny_llm.errors import ConfigError, RequestError

_MOST_TOLD = 500  # characters of what a tool says of itself, which all prompts have


class McpServer(AbstractContextManager["McpServer"]):
    """A running server. Close it, or use it in a ``with``. Raises ConfigError if it does not come up.

    Its thread has the event loop that the package wants. What it says on stderr goes to the file ``log``.
    """

    def __init__(self, command: str, log: Path, seconds: float) -> None:
        try:
            mcp: Any = import_module("mcp")  # late, as it takes a second and few want it
            stdio: Any = import_module("mcp.client.stdio")
        except ModuleNotFoundError as error:
            raise ConfigError("--mcp needs the package mcp: pip install 'tiny-llm[mcp]'.") from error
        program, *arguments = shlex.split(command) or [""]
        server = mcp.StdioServerParameters(command=program, args=arguments)
        self._command, self._seconds = command, seconds
        self._log = log.open("a")
        self._client = mcp.Client(stdio.stdio_client(server, self._log), read_timeout_seconds=seconds)
        self._loop, self._end = asyncio.new_event_loop(), asyncio.Event()
        self._listed: Future[list[Any]] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        try:
            self._known = {tool.name: tool for tool in self._listed.result(seconds)}
        except Exception as error:
            self.close()
            raise ConfigError(f"The MCP server {command!r} does not come up: {_reason(error)}.") from error

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()
        self._log.close()

    def tools(self, allowed: Sequence[str]) -> list[AgentTool]:
        """Those of its tools that are ``allowed``; names of other servers' are passed over."""
        return [self._tool(self._known[name]) for name in allowed if name in self._known]

    @property
    def names(self) -> list[str]:
        """All tools that it has."""
        return list(self._known)

    def _tool(self, told: Any) -> AgentTool:
        def prepare(arguments: Any) -> Prepared:
            return Prepared(f"{told.name} {arguments}", lambda: self._called(told.name, arguments))

        about = (told.description or "")[:_MOST_TOLD]
        return AgentTool(told.name, about, told.input_schema, prepare, has_effect=True)

    def _called(self, name: str, arguments: Any) -> Outcome:
        call = self._client.call_tool(name, arguments)
        try:
            done = asyncio.run_coroutine_threadsafe(call, self._loop).result(2 * self._seconds)
        except Exception as error:  # the package raises what it likes: its server's faults, its own, anyio's
            raise RequestError(f"{name}: its server {self._command!r} failed: {_reason(error)}.") from error
        parts = [getattr(part, "text", f"[{part.type}]") for part in done.content]
        return Outcome("\n".join(parts), int(bool(done.is_error)))

    async def _serve(self) -> None:
        with suppress(BaseException):
            try:
                async with self._client:
                    self._listed.set_result((await self._client.list_tools()).tools)
                    await self._end.wait()
            except BaseException as error:
                if not self._listed.done():
                    self._listed.set_exception(error)
                raise


def _reason(error: BaseException) -> str:
    """What is wrong, without the groups that tasks put it into."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or "it gives no answer"
