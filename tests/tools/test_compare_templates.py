"""tools/compare_templates.py: each cell of its table, on templates of our own; the hub played by files."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import compare_templates as tool
import pytest
from huggingface_hub import ModelInfo

from tests.messages.test_chat_prompt import FAMILIES

CELLS = {
    "object": "========",
    "text": "===-===+",
    "mistral": "=-=====-",
    "llama": "======++",
    "lines": "========",
    "none": "===-----",
    "no system": "=-=-----",
}


def cells_of(table: str, template: str) -> str:
    (row,) = [line for line in table.split("\n") if line.endswith(f"  {template}")]
    return "".join(row.removesuffix(template).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in CELLS:
        (tmp_path / f"{name}.jinja").write_text(FAMILIES[name], "utf-8")
    return tmp_path


def test_each_family_is_shown_as_transformers_shows_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(folder)]) == 0
    table = capsys.readouterr().out
    assert {name: cells_of(table, name) for name in CELLS} == CELLS


def test_another_rendering_than_transformers_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tool.ours
    monkeypatch.setattr(tool, "ours", lambda *given: (right(*given) or "") + " ")
    assert tool.main([str(folder)]) == 1
    assert "!" in cells_of(capsys.readouterr().out, "object")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    assert tool.main([str(tmp_path)]) == 1


def test_templates_are_fetched_wherever_a_repository_has_them(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = [{"name": "default", "template": "no"}, {"name": "tool_use", "template": FAMILIES["text"]}]
    repositories = {
        "a/file": {"chat_template.jinja": FAMILIES["object"], "tokenizer_config.json": "{}"},
        "b/config": {"tokenizer_config.json": json.dumps({"chat_template": FAMILIES["mistral"]})},
        "c/named": {"tokenizer_config.json": json.dumps({"chat_template": named})},
        "d/none": {"tokenizer_config.json": "{}"},
    }

    def info(repo_id: str, timeout: float) -> ModelInfo:
        return ModelInfo(id=repo_id, siblings=[{"rfilename": name} for name in repositories[repo_id]])

    def download(repo_id: str, name: str) -> str:
        path = tmp_path_factory.mktemp("hub") / name
        path.write_text(repositories[repo_id][name], "utf-8")
        return str(path)

    monkeypatch.setattr(tool, "PUBLISHED", tuple(repositories))
    monkeypatch.setattr(tool.huggingface_hub, "model_info", info)
    monkeypatch.setattr(tool.huggingface_hub, "hf_hub_download", download)
    assert tool.main([]) == 0
    said = capsys.readouterr()
    shown = {name: cells_of(said.out, name) for name in ("a/file", "b/config", "c/named")}
    assert shown == {"a/file": CELLS["object"], "b/config": CELLS["mistral"], "c/named": CELLS["text"]}
    assert "d/none: KeyError" in said.err


@pytest.mark.parametrize("way", ["refused", "offline"])
def test_without_a_hub_one_line_says_so(
    way: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a traceback, after half a minute of tries."""
    with socket.socket() as bound:  # nobody listens
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setattr(tool.huggingface_hub.model_info.__self__, "endpoint", endpoint)
        monkeypatch.setattr(tool.huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(tool.huggingface_hub.constants, "HF_HUB_OFFLINE", way == "offline")
        assert tool.main([]) == 1
    said = capfd.readouterr()
    assert said.err.startswith(f"error: {endpoint} cannot be reached (") and said.err.count("\n") == 1
    assert "TEMPLATES=folder" in said.err and not said.out
