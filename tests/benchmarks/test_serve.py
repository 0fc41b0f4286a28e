"""The load generator: what it reads of a stream however that is cut, its figures, and its picture."""

from __future__ import annotations

import json
import socket
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from measure.environments import PeerMissing
from measure.http_load import Target, read, run
from measure.llama_server import binary_of
from measure.serve_plot import draw
from measure.serving import Asked, figures, mixed_lengths, poisson, quantile

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**told: object) -> bytes:
    """An event in a chunk of its own."""
    data = b"data: " + json.dumps(told).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream(tokens: int) -> bytes:
    texts = [event(choices=[{"text": f"t{i}", "finish_reason": None}]) for i in range(tokens)]
    last = [event(choices=[{"text": "", "finish_reason": "length"}])]
    usage = [event(choices=[], usage={"completion_tokens": tokens, "prompt_tokens": 5})]
    return HEAD + b"".join(texts + last + usage) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_an_answer_reads_the_same_however_it_is_cut(size: int) -> None:
    whole, asked = stream(4), Asked(5, 4)
    read(asked, [(float(at), whole[at : at + size]) for at in range(0, len(whole), size)])
    assert not asked.error and asked.tokens == 4 and asked.prompt_tokens == 5 and len(asked.came) == 4
    assert asked.came == sorted(asked.came)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{busy}", "429"),
        (stream(3)[: len(stream(3)) // 2], "broke off"),
        (HEAD + event(error={"message": "by design"}), "by design"),
        (HEAD + event(choices=[{"text": "", "finish_reason": "stop"}]), "no text"),
    ],
)
def test_what_went_wrong_is_an_error_and_no_figure(answer: bytes, said: str) -> None:
    asked = Asked(5, 4)
    read(asked, [(0.0, answer)])
    assert said in asked.error
    assert figures([asked], 1.0, 1.0, 1.0) | {"failed": 1.0, "tok_s": 0.0} == figures([asked], 1.0, 1.0, 1.0)


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that says the same to everyone, and keeps what it was asked."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    one, _ = listening.accept()
                except OSError:
                    return
                heard.append(one.recv(1 << 16))
                one.sendall(answer)
                one.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heard
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("streams", [None, 1, 3])
def test_all_requests_are_sent_and_timed(streams: int | None) -> None:
    with answering(stream(4)) as (url, heard):
        target = Target(url, "m", key="secret")
        asked = [Asked(5, 4, at=0.001 * number) for number in range(7)]
        load = run(target, [(one, target.request("hello", 4, {})) for one in asked], streams)
    assert len(heard) == 7 and all(b"Authorization: Bearer secret" in one for one in heard)
    assert json.loads(heard[0].split(b"\r\n\r\n", 1)[1])["max_tokens"] == 4
    row = figures(asked, load.seconds, 60.0, 60.0)
    assert row["failed"] == 0 and row["tok_s"] == pytest.approx(28 / load.seconds)
    assert row["goodput_s"] == pytest.approx(7 / load.seconds)
    assert all(one.began <= one.came[0] <= one.ended for one in asked)


def test_a_server_that_is_not_there_is_a_failed_request() -> None:
    target = Target("http://127.0.0.1:9", "m")
    asked = Asked(1, 1)
    run(target, [(asked, b"")], 1)
    assert "Refused" in asked.error


def test_chat_is_asked_as_chat() -> None:
    request = Target("http://h:8000/base", "m", path="/v1/chat/completions").request("hello", 4, {})
    assert request.startswith(b"POST /base/v1/chat/completions ") and b'"messages"' in request


def test_our_own_path_tells_the_engines_time() -> None:
    texts = [event(index=0, text="t", token_ids=[i]) for i in range(2)]
    last = event(index=0, text="u", finish_reason="length", ttft_s=0.25)
    asked = Asked(5, 3)
    read(asked, [(1.0, HEAD + texts[0]), (2.0, texts[1] + last)])
    assert not asked.error and asked.engine_ttft_s == 0.25 and asked.came == [1.0, 2.0, 2.0]


def test_figures_of_known_times() -> None:
    asked = Asked(5, 3, began=1.0, came=[1.5, 1.6, 1.9], ended=2.0, tokens=3)
    row = figures([asked], 2.0, 0.6, 0.2)
    assert row["tok_s"] == 1.5 and row["ttft_p50_ms"] == pytest.approx(500)
    assert row["itl_p95_ms"] == pytest.approx(300) and row["e2e_p50_ms"] == pytest.approx(1000)
    assert row["goodput_s"] == 0, "a gap of 300 ms is not within 200"
    assert figures([asked], 2.0, 0.6, 0.31)["goodput_s"] == 0.5
    assert quantile([], 0.5) == 0 and quantile([3, 1, 2], 0.5) == 2


def test_lengths_and_arrivals_are_the_same_every_time() -> None:
    assert mixed_lengths(50, 100, 40) == mixed_lengths(50, 100, 40)
    assert all(50 <= p <= 150 and 20 <= a <= 60 for p, a in mixed_lengths(50, 100, 40))
    due = poisson(2000, 10.0, seed=1)
    assert due == sorted(due) and due[-1] == pytest.approx(200, rel=0.1)
    assert poisson(3, 0.0, seed=1) == [0.0, 0.0, 0.0]


def test_the_picture_has_a_bar_for_each_figure() -> None:
    row = {"tok_s": 10.0, "ttft_p50_ms": 5.0, "itl_p50_ms": 1.0}
    picture = ET.fromstring(draw({"1 <stream>": {"a & b": row, "c": row}, "8": {"c": row}}))
    titles = [node.text for node in picture.iter() if node.tag.endswith("title")]
    assert len(titles) == 9 and "a & b: 10.0" in titles
    with pytest.raises(ValueError, match="no figures"):
        draw({})


def test_a_server_that_was_not_built_says_how_to(tmp_path: Path) -> None:
    with pytest.raises(PeerMissing, match=r"peers.py make llama-server"):
        binary_of(tmp_path)
