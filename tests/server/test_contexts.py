"""/v1/contexts, and requests that name them: the answers of one long prompt, each key's own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Running

TEXT = "The KV cache holds keys and values of all tokens so far. " * 4
OTHER = "A scheduler decides who runs in a step. " * 3
ASKED = {"prompt": "What is a KV cache?", "max_tokens": 8, "temperature": 0}


def post(running: Running, path: str, **body: Any) -> Any:
    with running.http() as http:
        return http.post(path, json=body)


def test_a_context_is_made_listed_used_and_removed(running: Running) -> None:
    made = post(running, "/v1/contexts", name="kv cache", text=TEXT, ttl=600).json()
    assert made["id"] == "kv cache" and made["ready"] and 500 < made["expires_in"] <= 600
    post(running, "/v1/contexts", name="other", text=OTHER)
    with running.http() as http:
        try:
            listed = http.get("/v1/contexts").json()["data"]
            assert [one["id"] for one in listed] == ["kv cache", "other"]
            encode = running.service.llm.tokenizer.encode
            whole = ASKED | {"prompt": encode(TEXT) + encode("What is a KV cache?")}
            want = post(running, "/v1/completions", **whole).json()
            got = post(running, "/v1/completions", **ASKED, contexts=["kv cache"]).json()
            assert got["choices"] == want["choices"]
            assert got["usage"]["prompt_tokens"] == want["usage"]["prompt_tokens"]
            assert got["usage"]["prompt_tokens_details"]["cached_tokens"] >= made["tokens"] - 16
            both = {"contexts": ["other", "kv cache"], "join": "independent", "recompute": 2}
            answers = [post(running, "/v1/completions", **ASKED, **both).json() for _ in range(2)]
            assert answers[0]["choices"] == answers[1]["choices"]
            assert answers[0]["usage"]["prompt_tokens_details"]["cached_tokens"] >= made["tokens"]
        finally:
            for name in ("kv cache", "other"):
                assert http.delete(f"/v1/contexts/{name}").json() == {
                    "id": name,
                    "object": "context",
                    "deleted": True,
                }
        again = http.delete("/v1/contexts/other")
        assert again.status_code == 404 and again.json()["error"]["code"] == "context_not_found"
    gone = post(running, "/v1/completions", **ASKED, contexts=["other"])
    assert gone.status_code == 400 and "There is no context 'other'" in gone.json()["error"]["message"]


def test_a_chats_contexts_stand_first_in_its_system_message(running: Running) -> None:
    post(running, "/v1/contexts", name="a", text=TEXT)
    question = {"role": "user", "content": "What is a KV cache?"}
    options = {"max_tokens": 8, "temperature": 0}
    try:
        for messages, system in (
            ([question], TEXT),
            ([{"role": "system", "content": "Be short."}, question], TEXT + "Be short."),
        ):
            got = post(running, "/v1/chat/completions", messages=messages, contexts=["a"], **options).json()
            whole = [{"role": "system", "content": system}, question]
            want = post(running, "/v1/chat/completions", messages=whole, **options).json()
            assert got["choices"][0]["message"] == want["choices"][0]["message"]
            apart = abs(got["usage"]["prompt_tokens"] - want["usage"]["prompt_tokens"])
            assert apart <= 1, "a text's last token may be another where a text follows"
    finally:
        with running.http() as http:
            http.delete("/v1/contexts/a")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"name": "", "text": "x"}, "name"),
        ({"name": "x"}, "text is missing"),
        ({"name": "x", "text": "y", "ttl": 0}, "ttl"),
        ({"name": "x", "text": "y", "colour": 1}, "colour is not supported here"),
    ],
)
def test_a_context_that_cannot_be_is_refused_by_its_field(
    running: Running, body: dict[str, object], said: str
) -> None:
    refused = post(running, "/v1/contexts", **body)
    assert refused.status_code == 400 and said in refused.json()["error"]["message"]


def test_a_salt_has_its_own_contexts(running: Running) -> None:
    post(running, "/v1/contexts", name="mine", text=TEXT, cache_salt="me")
    with running.http() as http:
        assert http.get("/v1/contexts").json()["data"] == []
        assert len(http.get("/v1/contexts?cache_salt=me").json()["data"]) == 1
        assert post(running, "/v1/completions", **ASKED, contexts=["mine"]).status_code == 400
        mine = post(running, "/v1/completions", **ASKED, contexts=["mine"], cache_salt="me")
        assert mine.status_code == 200
        assert http.delete("/v1/contexts/mine?cache_salt=me").status_code == 200
