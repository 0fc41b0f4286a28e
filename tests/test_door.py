"""The package's door: what it opens, and that nobody pays for a room that they do not enter."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny_llm

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_MLX = [
    "tiny_llm",
    "tiny_llm.data",
    "tiny_llm.sampling_params",
    "tiny_llm.config",
    "tiny_llm.kv.blocks",
    "tiny_llm.kv.prefix",
    *(f"tiny_llm.scheduler.{file.stem}" for file in sorted((ROOT / "tiny_llm/scheduler").glob("[!_]*.py"))),
    "tiny_llm.options",
    "tiny_llm.cli",
    "tiny_llm.commands.models",
    "book.course.commands",
]


def in_child(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_a_room_without_arrays_loads_no_mlx() -> None:
    modules = " ".join(WITHOUT_MLX)
    code = f"""
import importlib, json, sys
guilty = None
for name in "{modules}".split():
    importlib.import_module(name)
    if "mlx" in sys.modules:
        guilty = name
        break
print(json.dumps(guilty))
"""
    assert in_child(code) is None, "it imports MLX, by itself or by what it imports"


def test_the_door_s_names_are_what_they_were() -> None:
    names = in_child("import json, tiny_llm; from tiny_llm import *; print(json.dumps(sorted(globals())))")
    assert set(tiny_llm.__all__) <= set(names) and set(tiny_llm.__all__) <= set(dir(tiny_llm))
    for name in tiny_llm.__all__:
        given = getattr(tiny_llm, name)
        assert given.__name__ == name and getattr(importlib.import_module(given.__module__), name) is given


def test_what_is_not_there_is_said_as_python_says_it() -> None:
    with pytest.raises(AttributeError, match="module 'tiny_llm' has no attribute 'LMM'"):
        tiny_llm.LMM  # type: ignore[attr-defined]  # noqa: B018
