"""Events are lines to every reader: what str.splitlines and httpx take for a line end is escaped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx2 as httpx

TEXT = "a\u2028b\x85c\u2029d"


def text_of(event: dict[str, Any]) -> str:
    """What an event of any interface adds to the text."""
    if "choices" in event:
        choice = event["choices"][0]
        return str(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return str(
        event["delta"] if event.get("type") == "response.output_text.delta" else event.get("text") or ""
    )


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
        ("/generate", {"prompt": "x"}),
    ],
)
def test_a_line_separator_in_a_text_ends_no_line(http: httpx.Client, path: str, asked: Any) -> None:
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**asked, "regex": TEXT, "temperature": 0, "stream": True, most: 50}
    with http.stream("POST", path, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    assert all(line.endswith("}") for line in lines), [line for line in lines if not line.endswith("}")]
    assert "".join(text_of(json.loads(line.removeprefix("data: "))) for line in lines).startswith(TEXT)
    del body["stream"]
    whole = http.post(path, json=body)
    assert TEXT in json.dumps(whole.json(), ensure_ascii=False) and len(whole.text.splitlines()) == 1
