"""Caches that cannot be written, and users without a home: what is kept there is made again, no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.user_cache import user_cache, writable


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing can be made, not by root either: a file lies in its way."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    return tmp_path / "file" / "cache"


def test_where_the_cache_cannot_be_written_the_process_has_a_folder_of_its_own(read_only: Path) -> None:
    assert user_cache() == read_only / "tiny_llm"
    own = writable(user_cache())
    assert own.is_dir() and own != user_cache() and own.stat().st_mode & 0o077 == 0
    assert writable(None) == own


def test_a_folder_that_can_be_written_is_made(tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b") == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # as expanduser leaves it for a user who is not in /etc/passwd
    assert user_cache() is None


STEP = """
from tiny_llm import LLM, SamplingParams
llm = LLM("demo", backend="metalsim")
(answer,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
assert answer.error is None and len(answer.token_ids) == 2, answer
"""


@pytest.mark.slow
def test_a_step_of_metalsim_needs_no_cache(read_only: Path) -> None:
    """It failed with PermissionError, and every request with it."""
    if reason := why_not():
        pytest.skip(reason)
    child = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
