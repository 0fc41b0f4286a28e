"""A token id that makes no sense, at each place where one enters: an error or an answer, never a crash.

MLX checks no index: what is beyond the vocabulary reads or writes somewhere else in memory. So each attempt
is made in a process of its own, which names it before it is made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import Batch, KVCache
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import RequestError
from tiny_llm.ops import backend
from tiny_llm.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

COMMON = """
import faulthandler, json, random, sys
from pathlib import Path

faulthandler.enable()
sys.path.insert(0, sys.argv[2])
VOCAB = 2048
IDS = [-(2**63), -(2**31), -1, 0, VOCAB - 1, VOCAB]
IDS += [2**31 - 1, 2**31, 10**9, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]
folder = Path(sys.argv[1])
chance = random.Random(6)

def around(value):
    \"\"\"The id alone, and among good ones.\"\"\"
    good = [chance.randrange(VOCAB) for _ in range(3)]
    good.insert(chance.randrange(4), value)
    return [value], good

def say(*what):
    print(*what, flush=True)

def names(name, ids):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
"""

LIBRARY = (
    COMMON
    + """
import mlx.core as mx
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.ops.backend import cpu, works
from tiny_llm.sampling.penalties import History, penalize

llm = LLM(folder)
refused = ConfigError, RequestError

def answer(prompt, model=llm, **options):
    (completion,) = model.generate([prompt], SamplingParams(max_tokens=2, **options))
    assert completion.error is None and all(0 <= i < VOCAB for i in completion.token_ids), completion

def own_end(where):
    def load(ids):
        if ids not in ([-1], [VOCAB - 1], [VOCAB], [10**9], [2**63]):
            return  # a folder takes longer to load than all the rest
        (folder / "config.json").write_text(config)
        (folder / "generation_config.json").write_text(generation)
        names(where, ids)
        answer("Hello", LLM(folder), min_tokens=2)
    return load

def mask(ids):
    size = ids[0] if 0 <= ids[0] <= 10**9 else 5
    if size != VOCAB:
        params = SamplingParams(constraint=lambda: lambda tokens: b"1" * min(size, 10**5))
        (completion,) = llm.generate("Hello", params)
        assert "expected 2048 bytes" in completion.error, completion
        raise RequestError("the request, not the engine")

def penalized(ids):
    history = History(frozenset(ids), ids)
    history.answer.update(ids)
    params = SamplingParams(min_tokens=9, repetition_penalty=1.5, presence_penalty=1.0)
    mx.eval(penalize(mx.zeros((2, VOCAB)), [(1, params, history, 0)]))

def kernels(ids):
    if works():
        table, rows = cpu.pack_dense(mx.zeros((VOCAB, 16))), len(ids)
        mx.eval(cpu.embedding(mx.array(ids), table))
        tokens = mx.array([i % 2**32 for i in ids], mx.uint32)
        mx.eval(cpu.logprobs(mx.zeros((rows, VOCAB)), tokens, 2))

def text(ids):
    for one in ids:
        llm.tokenizer.token_bytes(one)
        stream = llm.tokenizer.stream()
        stream.push(one), stream.finish()
    llm.tokenizer.decode(ids)

config, generation = ((folder / name).read_text() for name in ("config.json", "generation_config.json"))
PLACES = {
    "prompt": answer,
    "stop_token_ids": lambda ids: answer("Hello", stop_token_ids=ids, min_tokens=2),
    "logit_bias": lambda ids: answer("Hello", logit_bias=dict.fromkeys(ids, 1.0)),
    "stops with penalties": lambda ids: answer("Hello", repetition_penalty=1.2, stop_token_ids=ids),
    "top_k": lambda ids: answer("Hello", top_k=ids[0], temperature=1.0),
    "logprobs": lambda ids: answer("Hello", logprobs=ids[0], prompt_logprobs=ids[0]),
    "min_tokens": lambda ids: answer("Hello", min_tokens=ids[0]),
    "config.json": own_end("config.json"),
    "generation_config.json": own_end("generation_config.json"),
    "constraint": mask,
    "penalize": penalized,
    "kernels": kernels,
    "text": text,
}
for place, enter in PLACES.items():
    counts = [0, 0]
    for token_id in IDS:
        for ids in around(token_id):
            say(place, ids)
            try:
                enter(ids)
                counts[0] += 1
            except (RequestError, ConfigError, ValueError, RuntimeError, OverflowError, TypeError) as error:
                assert isinstance(error, refused) or place in ("penalize", "kernels"), repr(error)
                counts[1] += 1
    say("taken, refused:", *counts)
    answer("Hello")  # it still does
say("places", *PLACES)
"""
)

SERVER = (
    COMMON
    + """
from tests.server.conftest import serving

names("generation_config.json", [2045, VOCAB, 10**9, 2**40])

def bodies(ids):
    yield "/v1/completions", {"prompt": ids}
    yield "/v1/completions", {"prompt": [[1], ids], "logprobs": 2, "echo": True}
    for field in ({"stop_token_ids": ids}, {"logit_bias": {str(i): 1 for i in ids}}, {"top_k": ids[0]}):
        for rest in ({}, {"min_tokens": 2}, {"stream": True}):
            yield "/v1/completions", {"prompt": "Hello", **field, **rest}
            yield "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **field, **rest}
    yield "/generate", {"prompt": ids}
    yield "/generate", {"prompt": "Hello", "stop_token_ids": ids, "min_tokens": 2}
    yield "/detokenize", {"tokens": ids}

with serving(folder) as running, running.http() as http:
    for token_id in IDS:
        for ids in around(token_id):
            for path, body in bodies(ids):
                say(path, body)
                short = body if path == "/detokenize" else {"max_tokens": 3, **body}
                answer = http.post(path, json=short)
                is_good = all(0 <= i < VOCAB for i in ids) or "top_k" in body and answer.status_code == 200
                assert answer.status_code == (200 if is_good else 400), (body, answer.text[:500])
                assert is_good or answer.json()["error"]["param"], answer.text
    form = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], "regex": "[0-9]{2}"}
    answer = http.post("/v1/chat/completions", json=form)
    assert answer.json()["choices"][0]["message"]["content"].isdigit(), answer.text
    running.wait_until_idle()
"""
)


def survives(code: str, folder: Path) -> str:
    """What the child said; its last attempt is in the assertion."""
    command = [sys.executable, "-c", code, str(folder), str(ROOT)]
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = "\n".join(result.stdout.splitlines()[-3:])
    assert result.returncode == 0, f"exit code {result.returncode} after\n{last}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.parametrize("name", ["ref", "cpu"])
def test_no_id_ends_the_process(name: str, demo_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "cpu" and not backend.works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    monkeypatch.setenv(backend.VARIABLE, name)
    told = survives(LIBRARY, demo_copy)
    assert told.splitlines()[-1].startswith("places prompt")


def test_no_id_ends_the_server(demo_copy: Path) -> None:
    survives(SERVER, demo_copy)


def test_a_bias_for_a_token_that_the_model_lacks_is_refused(demo: Path) -> None:
    llm = LLM(demo)
    vocab = llm.config.vocab_size
    wrong: list[dict[str, object]] = [
        {"logit_bias": {vocab: 1.0}},
        {"stop_token_ids": (10**9,), "min_tokens": 4},
    ]
    for options in wrong:
        (name,) = options.keys() - {"min_tokens"}
        expected = rf"{name} is \d+, but must be token ids in the vocabulary, which is 0 to {vocab - 1}"
        with pytest.raises(RequestError, match=expected):
            llm.generate("Hello", SamplingParams(**options))  # type: ignore[arg-type]


def test_an_end_id_beyond_the_vocabulary_ends_nothing(demo_copy: Path) -> None:
    before = LLM(demo_copy).end_ids
    path = demo_copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [*before, 2048, 10**9]}))
    llm = LLM(demo_copy)
    assert llm.end_ids == before
    (completion,) = llm.generate("Hello", SamplingParams(max_tokens=6, min_tokens=6))
    assert (len(completion.token_ids), completion.error) == (6, None)


def test_a_mask_of_another_size_is_its_requests_fault(demo: Path) -> None:
    llm = LLM(demo)
    short = SamplingParams(max_tokens=4, constraint=lambda: lambda tokens: b"1" * 5)
    requests = [llm.check("Hello", short), llm.check("Hello", SamplingParams(max_tokens=4))]
    ended = dict(llm.answers(requests))
    assert "expected 2048 bytes, got b'11111'" in str(ended[0].error)
    assert (ended[1].error, len(ended[1].token_ids)) == (None, 4)


def test_a_model_with_more_logits_than_tokens_ends_its_requests(demo: Path) -> None:
    """A plug-in's, whose head has rows that its embedding lacks: what was drawn would be looked up there."""
    llm = LLM(demo)
    model = llm.engine.runner.model

    def wide(batch: Batch, kv: KVCache) -> mx.array:
        return mx.pad(model(batch, kv), [(0, 0), (0, 2**20)], constant_values=100)

    wide.config = model.config  # type: ignore[attr-defined]
    llm.engine.runner.model = wide  # type: ignore[assignment]
    (completion,) = llm.generate("Hello", SamplingParams(max_tokens=4))
    assert "the model gave logits (1, 1050624), expected (1, 2048)" in str(completion.error)
