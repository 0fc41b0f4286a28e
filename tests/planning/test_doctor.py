"""main.py doctor: backends, and measurements as they were stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_llm.cli import app
from tiny_llm.ops.autotune import Autotuner, about_this_machine, autotuner
from tiny_llm.ops.backend import BACKENDS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotuner.cache_clear()
    yield
    autotuner.cache_clear()


def doctor() -> str:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    return done.output


def test_each_backend_is_there_or_why_not() -> None:
    lines = doctor().splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(BACKENDS)]] == list(BACKENDS)
    assert "ref       there" in lines[2]
    assert lines[-1].endswith("nothing measured yet")


def test_what_was_measured_is_printed(tmp_path: Path) -> None:
    stored = Autotuner(
        tmp_path / "tiny_llm" / "autotune.json", about_this_machine(), lambda call: float(call())
    )  # type: ignore[arg-type]
    stored.ours("rms_norm 1536 bfloat16", lambda: 2e-5, lambda: 1e-5, lambda: True)
    stored.ours("rms_norm 896 bfloat16", lambda: 2e-5, lambda: 1e-5, lambda: False)
    lines = doctor().splitlines()
    assert "MLX: ours 20 us, MLX 10 us" in lines[-2]
    assert "ours: ours 20 us, MLX 10 us, whose bits depend on other rows" in lines[-1]
