"""An MCP server on stdin and stdout: lookup, which knows two facts, one that fails, one that ends it."""

from __future__ import annotations

import os

from mcp.server import MCPServer

server = MCPServer("facts")
FACTS = {"height of Oslo": "23", "color of the tent": "brown"}


@server.tool(description="Look up a fact.")
def lookup(query: str) -> str:
    return FACTS.get(query, "unknown")


@server.tool(description="Never called by an honest model. " * 100)
def secret(query: str) -> str:
    raise ValueError(f"no {query}")


@server.tool()
def leave() -> str:
    os._exit(3)


if __name__ == "__main__":
    server.run()
