"""What every test folder shares: where test data lies, settings, and choosing which tests run.

A test that takes more than about a second of processor time is marked ``slow``: ``make quick`` leaves it
out. A chapter's tests are ordinary tests with ``@pytest.mark.chapter("1.3")``. Choose them by
``pytest --chapter 1.3`` (may be repeated) or ``pytest -m 'chapter("1.3")'``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings

import tiny_llm
from tiny_llm.ops.backend import VARIABLE, cpu, set_threads, use, works

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--chapter ID``."""
    parser.addoption("--chapter", action="append", default=[], metavar="ID", help="only this chapter's tests")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, and turn each ``--chapter`` into a part of pytest's own ``-m``.

    Hypothesis draws the same examples in every run, and looks at no clock. Without CPU kernels, or
    on a GPU, tests that name no backend run on ``ref``.
    """
    _share_cores()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start find the package compiled
    if not works() or mx.default_device().type != mx.cpu:  # no warning in each test, no trial of GPU kernels
        os.environ.setdefault(VARIABLE, "ref")
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.load_profile("repeatable")
    config.addinivalue_line("markers", "chapter(id): the chapter of the course that this test checks")
    config.addinivalue_line("markers", "slow: takes more than a second; `make quick` leaves it out")
    asked = config.getoption("chapter")
    for chapter in asked:
        if not re.fullmatch(r"\d+\.\d+", chapter):
            raise pytest.UsageError(f"--chapter is {chapter!r}, but must be like 1.3.")
    # pytest's -m matches a mark by keyword only, so chapter("1.3") is given its keyword.
    given = re.sub(r"""\bchapter\((?=["'])""", "chapter(id=", config.option.markexpr)
    either = " or ".join(f'chapter(id="{chapter}")' for chapter in asked)
    config.option.markexpr = f"({given}) and ({either})" if given and either else given or either


def _share_cores() -> None:
    """Where several processes run tests, give the kernels of each its share of the cores.

    Threads that wait for each other's work do so in a loop: with more of them than cores all are slow. It is
    said in the environment, so that it holds for the processes that tests start, too.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
    if workers > 1:
        share = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("TINY_LLM_THREADS", str(share))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Repeat each mark with its id by keyword, for ``-m``; refuse a chapter that no test has."""
    known: set[str] = set()
    for item in items:
        for chapter in {mark.args[0] for mark in item.iter_markers("chapter") if mark.args}:
            item.add_marker(pytest.mark.chapter(id=chapter))
            known.add(chapter)
    missing = sorted(set(config.getoption("chapter")) - known)
    if missing:
        there = ", ".join(sorted(known)) or "none"
        raise pytest.UsageError(f"No test of chapter {', '.join(missing)} here; there are: {there}.")


def _off(got: mx.array, expected: mx.array) -> float:
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    return mx.max(mx.abs(got - expected)).item() / (mx.max(mx.abs(expected)).item() or 1.0)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """A test that sets how many threads the kernels use, 300 say, leaves the process as it was."""
    before = cpu.num_threads() if works() else None
    yield
    if before is not None and cpu.num_threads() != before:
        set_threads(before)


@pytest.fixture(scope="session")
def off() -> Callable[[mx.array, mx.array], float]:
    """``off(got, expected)``: the largest difference, relative to the largest expected value."""
    return _off


@pytest.fixture(scope="module", params=["ref", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that computes in float32, in turn; the CPU kernels where they were built."""
    if request.param == "cpu" and not works():
        pytest.skip("the CPU kernels were not built: no C++ compiler")
    with use(request.param) as name:
        yield name


@pytest.fixture
def ref() -> Iterator[None]:
    """Plain MLX, whose matrices are arrays that a test can look at.

    For one test: two fixtures of a module's that each choose a backend may end in the order they began in,
    and the second would bring back what the first had chosen.
    """
    with use("ref"):
        yield


@pytest.fixture(scope="session")
def demo() -> Path:
    """The bundled model's folder; its draft lies in it."""
    return ROOT / "tiny_llm" / "demo"


@pytest.fixture(scope="session")
def llm() -> tiny_llm.LLM:
    """The bundled model, loaded once; the engine is imported by those who ask for it."""
    return tiny_llm.LLM("demo")


@pytest.fixture
def demo_copy(demo: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model, to be changed or broken."""
    return Path(shutil.copytree(demo, tmp_path / "model", ignore=shutil.ignore_patterns("draft")))


@pytest.fixture(scope="session")
def endless(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a slow model that knows no end: there is time to stop its answer, which rambles."""
    folder = tmp_path_factory.mktemp("endless")
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(demo / name, folder)
    for name in ("config.json", "tokenizer_config.json"):
        facts = json.loads((demo / name).read_text())
        ends = [facts.pop(key) for key in ("eos_token_id", "eos_token") if key in facts]
        assert ends, name
        (folder / name).write_text(json.dumps(facts))
    return ["--model", str(folder), "--backend", "ref", "--temperature", "4", "--seed", "9"]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The small checkpoints and activations written by tools/make_golden.py."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and tokenizers, in the folder $TINY_LLM_DATA or ../shared/data; skips without."""
    folder = Path(os.environ.get("TINY_LLM_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set TINY_LLM_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """The folder of the real 260K-parameter LLaMA, with the answers published for it."""
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def qwen2_tokenizer_folder(shared_data: Path) -> Path:
    """The folder of Qwen2's published tokenizer.json and tokenizer_config.json."""
    return shared_data / "tokenizers" / "qwen2"


@pytest.fixture(scope="session")
def thinking_model(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``thinking_model(template, has_tags=True)``: the bundled model with more in its template.

    Where it ``has_tags``, its last two words give way to ``<think>`` and ``</think>`` as tokens.
    """

    def made(template: str, *, has_tags: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("thinking") / "model"
        shutil.copytree(demo, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] += template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if has_tags:
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)[-2:]
            ids = [tokenizer["model"]["vocab"].pop(word) for word in words]
            tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-2]
            like = next(one for one in tokenizer["added_tokens"] if one["content"] == "<tool_call>")
            tags = zip(ids, ("<think>", "</think>"), strict=True)
            tokenizer["added_tokens"] = [
                *({**like, "id": token_id, "content": tag} for token_id, tag in tags),
                *tokenizer["added_tokens"],
            ]
            tokenizer["model"]["vocab"] |= {"<think>": ids[0], "</think>": ids[1]}
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder

    return made
