"""Names that need no hub: folders, bundled models, and names that mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tiny_llm.commands.models import listing
from tiny_llm.errors import ConfigError
from tiny_llm.weights.hub import REPO_ID, resolve


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(name, offline=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["model", "./model", "a/model", "~/model"])
def test_a_folder_is_itself(here, monkeypatch, name):
    monkeypatch.setenv("HOME", str(here))
    folder = Path(name).expanduser()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve(name).samefile(folder)


def test_a_folder_without_config(here):
    assert "has no config.json" in refused(str(here))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "a\\b"])
def test_a_path_that_is_not_there(here, name):
    assert f"There is no folder {name}" in refused(name)


def test_a_file_in_place_of_a_folder(here):
    (here / "model.safetensors").write_bytes(b"")
    assert "is a file, but a model is a folder" in refused("model.safetensors")


def test_near_names_are_suggested(here):
    assert "'qwen2-1.5b'" in refused("qwen-1.5b")
    assert "'tinyllama-1.1b'" in refused("tinylama")
    assert "'demo'" in refused("Demo ")


@pytest.mark.parametrize(
    "name", ["", " ", "hf:x/y", "x/", "/", "a--b/c", "a/..", "../a", "x/y.git", "é/x", "a/b\n"]
)
def test_what_cannot_be_a_hub_id_never_reaches_the_hub(here, name):
    assert refused(name)


def test_hub_ids_are_what_the_hub_takes_for_one():
    """Ours are the client's, but always with an organization."""
    parts = [
        "a",
        "A.b",
        "a-b",
        "a_b",
        "-a",
        "a-",
        ".a",
        "a.",
        "a..b",
        "a--b",
        "a.git",
        "é",
        "a b",
        "",
        "x" * 97,
    ]
    for name in [f"{owner}/{model}" for owner in parts for model in parts]:
        try:
            validate_repo_id(name)
            valid = True
        except HFValidationError:
            valid = False
        assert bool(REPO_ID.fullmatch(name)) == valid, name


@pytest.mark.parametrize("name", ["demo", "demo-draft"])
def test_the_bundled_models_are_in_the_package(name):
    folder = resolve(name)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / file).is_file(), file


def test_a_gguf_file_is_itself(here):
    (here / "x.gguf").write_bytes(b"GGUF")
    assert resolve("x.gguf").samefile(here / "x.gguf")
    assert "There is no file ./y.gguf. A file on the hub is" in refused("./y.gguf")


def test_gguf_files_in_the_cache_are_listed(here, monkeypatch):
    folder = here / "models--ada--tiny" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (folder / "tiny-Q4_0.gguf").write_bytes(b"GGUF")
    (folder / "gone.gguf").symlink_to(here / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    assert list(listing())[-1] == ("", "ada/tiny:tiny-Q4_0.gguf", "", "0.0 GB", "yes")
