"""What tests of the trial share: shapes that are quick to simulate, and kernels with planted faults."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_llm.metalsim.build import why_not
from tiny_llm.ops.metal import FOLDER, folder
from tiny_llm.proving.record import Shapes

Plant = Callable[[str, str, str], None]
BODY = "// kernel {}("


@pytest.fixture
def shapes() -> Shapes:
    experts = {"experts": 5, "expert_width": 32, "experts_of_a_row": 2}
    return Shapes(64, 4, 2, 16, 96, 50, 4, 32, "float32", 16, **experts)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Proofs of these tests are nobody else's; what clang compiled is kept where it always is."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("tiny_llm.proving.record.user_cache", lambda: cache)
    return cache


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """``plant(file, kernel, statement)``: the kernel's body begins with it, in processes started here too."""
    if reason := why_not():
        pytest.skip(reason)
    kernels = tmp_path / "kernels"
    for of in ("metal", "cuda"):
        shutil.copytree(folder(of), kernels / of)

    def into(file: str, kernel: str, statement: str) -> None:
        path = kernels / "metal" / f"{file}.metal"
        lines = path.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(BODY.format(kernel)))
        path.write_text("\n".join([*lines[: at + 1], f"    {statement}", *lines[at + 1 :]]) + "\n")
        monkeypatch.setenv(FOLDER, str(kernels))

    return into
