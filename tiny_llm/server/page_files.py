"""Owns the page's files, as they are sent. They carry no data: what the page shows it asks for, with the key.

What a model says is untrusted, so the headers let the page run and load nothing but these files, and
let no script make HTML of a string.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_SCRIPTS = "asking chats conversation dom highlight live markdown page store"
PAGE_FILES: Mapping[str, str] = {
    "/": "index.html",
    "/page/page.css": "page.css",
    **{f"/page/{name}.js": f"{name}.js" for name in _SCRIPTS.split()},
}
"""Path to file. Nothing else is ever read."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
_TYPES: Mapping[str, str] = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FOLDER = Path(__file__).parent / "page"


def page_routes() -> APIRouter:
    """The page, outside of the API's documentation."""
    router = APIRouter(include_in_schema=False)
    for path, name in PAGE_FILES.items():
        router.add_api_route(path, _sender(_FOLDER / name), methods=["GET"])
    return router


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    content, kind = file.read_bytes(), _TYPES[file.suffix]

    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
