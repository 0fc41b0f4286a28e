"""--plugin FILE: the appendix's plug-in, as the page prints it, against transformers; and others."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.cli import main
from tiny_llm.data import Batch
from tiny_llm.errors import ConfigError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models import registry
from tiny_llm.models.loading import load_model
from tiny_llm.ops.backend import use

PAGE = Path(__file__).resolve().parents[2] / "book" / "docs" / "appendix" / "plugin.md"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test adds is gone after it."""
    yield
    registry._named().clear()


@pytest.fixture
def starcoder2(tmp_path: Path) -> Path:
    """The page's code as a file."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 45, "a family is a small file"
    file = tmp_path / "starcoder2.py"
    file.write_text(code)
    return file


@pytest.mark.parametrize("backend", ["ref", None])
def test_the_appendix_s_plugin_computes_what_transformers_does(
    golden: Path, starcoder2: Path, greedy, off, backend: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"model_type is 'starcoder2', .* \(--plugin, or installed\)"):
        registry.load_config(golden / "starcoder2")
    registry.add_plugin(starcoder2)
    seen = mx.load(str(golden / "starcoder2" / "activations.safetensors"))
    assert isinstance(seen, dict)
    T = seen["tokens"].size
    with use(backend):
        model = load_model(golden / "starcoder2", dtype="float32")
        logits = model(Batch(seen["tokens"], seen["positions"], (0, T), mx.arange(T)), NoCache())
        assert off(logits, seen["logits"]) < 1e-4
        ids: list[int] = seen["greedy"].tolist()  # type: ignore[assignment]
        assert greedy(model, seen["tokens"][:4].tolist(), len(ids)) == ids


def test_a_command_takes_it(
    golden: Path, demo: Path, tmp_path: Path, starcoder2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden / "starcoder2", folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, folder)
    asked = ["generate", "--model", str(folder), "--raw", "-n", "3", "-p", "!!"]
    assert main(asked) != 0 and "model_type is 'starcoder2'" in capsys.readouterr().err
    assert main([*asked, "--plugin", str(starcoder2)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("x = 1", "holds 0 objects of Architecture or Family, expected one"),
        (
            "from tiny_llm.families.family import Family\na, b = Family(), Family()",
            "holds 2 objects of Architecture or Family",
        ),
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("def", "fails: SyntaxError"),
        (None, r"\(--plugin\) is no Python file"),
    ],
)
def test_a_file_that_is_no_plugin(tmp_path: Path, text: str | None, about: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=about):
        registry.add_plugin(file)


def test_a_file_may_build_on_a_family_of_ours_and_stand_for_it(tmp_path: Path, golden: Path) -> None:
    file = tmp_path / "llama.py"
    file.write_text(
        "from dataclasses import replace\nfrom tiny_llm.families.llama import LLAMA\n"
        "MINE = replace(LLAMA, facts={'qk_norm': 'head'})\n"
    )
    assert not registry.load_config(golden / "llama").qk_norm  # type: ignore[attr-defined]
    registry.add_plugin(file)
    assert registry.load_config(golden / "llama").qk_norm == "head"  # type: ignore[attr-defined]
