"""main.py doctor: backends, and what was found of our kernels as it was stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_llm.cli import app
from tiny_llm.ops.backend import BACKENDS
from tiny_llm.proving.record import KernelTiming, Proof, Record, Shapes

SHAPES = Shapes(896, 14, 2, 64, 4864, 151936, 4, 64, "bfloat16", 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "150")


def doctor() -> list[str]:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    return [line.strip() for line in done.output.splitlines()]


def test_each_backend_is_there_or_why_not() -> None:
    lines = doctor()
    first = lines.index("backends") + 1
    assert [line.split()[0] for line in lines[first : first + len(BACKENDS)]] == list(BACKENDS)
    assert lines[first].startswith("ref       there")
    assert lines[-1] == "kernels   none of ours was tried on a GPU here; the first start on one does it"


def test_what_was_found_is_a_table_with_a_row_for_each_shape() -> None:
    fast, slow = KernelTiming("1 row", 20.0, 30.0), KernelTiming("512 rows", 1000.0, 500.0)
    proofs = [
        Proof("rope", "", (fast,)),
        Proof("swiglu", "", (fast, slow)),
        Proof("sample", "a token by each option: another token"),
    ]
    Record.of("metal", SHAPES).add(proofs)
    lines = doctor()
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["rope", "1 row", "20.0", "30.0", "1.50x", "yes", "ours", "1.50x MLX's speed at 1 row"],
        ["sample", "", "", "", "", "no", "MLX's", "a token by each option: another token"],
        ["swiglu", "1 row", "20.0", "30.0", "1.50x", "yes", "MLX's", "0.50x MLX's speed at 512 rows"],
        ["", "512 rows", "1,000.0", "500.0", "0.50x", "", "", ""],
    ]
    assert any("4 bits in groups of 64, bfloat16" in line for line in lines)
    assert any("tokens may depend on what else is running" in line.lower() for line in lines)
