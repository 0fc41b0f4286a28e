"""From a name to a folder, against a server that plays the hub: nothing here leaves the machine."""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pexpect

REPO = "ada/tiny"


def small_repo(folder: Path) -> dict[str, bytes]:
    """The files of a sharded repository, with some that must never be asked for."""
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": json.dumps({"weight_map": shards}).encode(),
        "pytorch_model.bin": b"\x80\x04pickle",
        "modeling_tiny.py": b"raise SystemExit('ran code of a repository')",
        "README.md": b"# tiny",
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "2_Normalize/config.json": b"{}",
        "original/consolidated.00.pth": b"\x80\x04pickle",
        "original/model.safetensors": b"another copy",
        "consolidated.safetensors": b"another copy",
    }
    for name, shard in shards.items():
        mx.save_safetensors(str(folder / shard), {name: mx.arange(4.0)})
        files[shard] = (folder / shard).read_bytes()
    return files


ALLOWED = {
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "modules.json",
    "1_Pooling/config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


def test_downloads_what_is_needed_and_nothing_else(hub, child, tmp_path):
    hub.repos[REPO] = small_repo(tmp_path)
    folder = Path(child.resolve(REPO)["folder"])
    got = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert got == {name: hub.repos[REPO][name] for name in ALLOWED}
    asked = hub.asked_files()
    assert asked == ALLOWED, f"asked for more or less than is needed: {asked ^ ALLOWED}"


def test_a_terminal_shows_progress_and_a_pipe_does_not(hub, child, tmp_path):
    hub.repos[REPO] = small_repo(tmp_path)
    said = child.stderr()
    assert "folder" in child.resolve(REPO)
    assert child.stderr() == said, "an answer in a pipe must come without bars beside it"
    shutil.rmtree(child.cache)
    program, *arguments = child.command(REPO)
    terminal = pexpect.spawn(program, arguments, env=child.environment, dimensions=(24, 100), timeout=60)
    terminal.expect("model-00001-of-00002.safetensors: 100%")
    terminal.expect(pexpect.EOF)


def test_what_is_on_disk_needs_no_network(hub, child, tmp_path):
    hub.repos[REPO] = small_repo(tmp_path)
    first = child.resolve(REPO)
    asked = len(hub.requests)
    assert child.resolve(REPO, offline=True) == first
    assert child.resolve(REPO) == first
    assert hub.requests[asked:] == [], "a complete model on disk must not ask the hub"


def test_small_files_that_another_program_left_out_are_asked_for_once(hub, child, tmp_path):
    """Its cache has config, tokenizer and weights; the chat template and the end ids were lost."""
    hub.repos[REPO] = small_repo(tmp_path)
    folder = Path(child.resolve(REPO)["folder"])
    (folder / "chat_template.jinja").unlink()
    shutil.rmtree(folder.parents[1] / ".no_exist")
    asked = len(hub.requests)
    assert child.resolve(REPO, offline=True) == {"folder": str(folder)}, "usable offline as it is"
    assert len(hub.requests) == asked and not (folder / "chat_template.jinja").exists()
    hub.refuse[REPO] = (503, {})
    assert child.resolve(REPO) == {"folder": str(folder)}, "and where the hub cannot be asked"
    del hub.refuse[REPO]
    assert child.resolve(REPO) == {"folder": str(folder)}
    assert (folder / "chat_template.jinja").read_bytes() == hub.repos[REPO]["chat_template.jinja"]
    asked = len(hub.requests)
    assert child.resolve(REPO) == {"folder": str(folder)}
    assert len(hub.requests) == asked, "which files there are not must be remembered"


def test_offline_without_a_copy_says_what_is_on_disk(hub, child, tmp_path):
    hub.repos[REPO] = small_repo(tmp_path)
    child.resolve(REPO)
    asked = len(hub.requests)
    by_flag = child.resolve("qwen2-0.5b", offline=True)
    by_environment = json.loads(child.start("qwen2-0.5b", HF_HUB_OFFLINE="1").communicate()[0])
    for answer in (by_flag, by_environment):
        assert answer["error"] == "WeightError"
        assert "Qwen/Qwen2-0.5B-Instruct is not on disk" in answer["message"]
        assert f"On disk: demo (bundled), {REPO}." in answer["message"]
    assert hub.requests[asked:] == [], "offline must not touch the network"


def test_a_copy_that_lost_a_shard_is_completed(hub, child, tmp_path):
    lost = "model-00002-of-00002.safetensors"
    hub.repos[REPO] = small_repo(tmp_path)
    folder = Path(child.resolve(REPO)["folder"])
    (folder / lost).unlink()
    assert child.resolve(REPO, offline=True)["error"] == "WeightError", "half a model must not pass for one"
    assert child.resolve(REPO) == {"folder": str(folder)}
    assert (folder / lost).read_bytes() == hub.repos[REPO][lost]


def test_a_download_that_was_killed_goes_on_where_it_stopped(hub, child):
    written = 10 * 2**20  # what the client writes at a time
    weights = random.Random(0).randbytes(1000) * 11_000
    hub.repos[REPO] = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": weights}
    hub.stall_after = written + 1000
    process = child.start(REPO)
    assert hub.stalled.wait(timeout=30), "the download never began"
    wait_until(lambda: sizes(child.cache, "*.incomplete") == [written])
    process.kill()
    process.communicate()
    hub.stall_after = None
    folder = Path(child.resolve(REPO)["folder"])
    assert hub.downloads() == [("model.safetensors", None), ("model.safetensors", f"bytes={written}-")]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert sizes(child.cache, "*.incomplete") == [], "the part must not stay beside the whole"


def sizes(folder: Path, pattern: str) -> list[int]:
    return [path.stat().st_size for path in folder.rglob(pattern)]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 30 s in vain")


def test_a_file_that_arrives_damaged_is_not_kept(hub, child, tmp_path):
    hub.repos[REPO], hub.damage = small_repo(tmp_path), True
    answer = child.resolve(REPO)
    assert answer["error"] == "WeightError" and "SHA-256" in answer["message"]
    hub.damage = False
    folder = Path(child.resolve(REPO)["folder"])
    shard = "model-00001-of-00002.safetensors"
    assert (folder / shard).read_bytes() == hub.repos[REPO][shard]


def test_the_token_goes_to_the_hub_and_not_to_the_storage_it_points_to(hub, child, tmp_path):
    hub.repos[REPO] = small_repo(tmp_path)
    assert "folder" in child.resolve(REPO, HF_TOKEN="hf_secret")
    given = {r.path.startswith("/storage/"): r.authorization for r in hub.requests}
    assert given == {False: "Bearer hf_secret", True: None}


def test_a_gated_model_says_how_to_get_access(hub, child):
    hub.refuse[REPO] = (403, {"X-Error-Code": "GatedRepo"})
    answer = child.resolve(REPO)
    assert answer["error"] == "WeightError"
    assert f"{hub.endpoint}/{REPO}" in answer["message"] and "HF_TOKEN" in answer["message"]
    assert "\n" not in answer["message"]


def test_a_refused_token_is_told(hub, child):
    hub.refuse[REPO] = (401, {})
    answer = child.resolve(REPO, HF_TOKEN="hf_wrong")
    assert "HF_TOKEN" in answer["message"] and "hf_wrong" not in answer["message"]


def test_a_name_that_the_hub_does_not_know_suggests_near_ones(hub, child):
    answer = child.resolve("Qwen/Qwen2-1.5B-Instrct")
    assert answer["error"] == "ConfigError"
    assert "'Qwen/Qwen2-1.5B-Instruct'" in answer["message"]


def test_no_network_is_one_clear_line(child):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        answer = json.loads(child.start(REPO, HF_ENDPOINT=endpoint).communicate()[0])
    assert answer["error"] == "WeightError"
    assert "Check the network" in answer["message"] and "On disk: demo (bundled)" in answer["message"]
    assert "\n" not in answer["message"]


def test_a_repository_without_safetensors_is_refused(hub, child):
    hub.repos[REPO] = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"\x80\x04"}
    answer = child.resolve(REPO)
    assert answer["error"] == "WeightError" and "safetensors" in answer["message"]
    assert "pytorch_model.bin" not in hub.asked_files()


def gguf_repo() -> dict[str, bytes]:
    names = ("tiny-Q4_K_M.gguf", "tiny-q8_0.gguf", "tiny-BF16.gguf", "mmproj-BF16.gguf", "README.md")
    return {name: name.encode() * 1000 for name in names}


def test_a_gguf_file_by_its_name_or_its_type(hub, child):
    """One file of many; what is on disk is found again by either, without the network."""
    hub.repos[REPO] = gguf_repo()
    for wanted, name in (
        ("Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("q4_k_m", "tiny-Q4_K_M.gguf"),
        ("tiny-q8_0.gguf", "tiny-q8_0.gguf"),
    ):
        path = Path(child.resolve(f"{REPO}:{wanted}")["folder"])
        assert path.name == name and path.read_bytes() == hub.repos[REPO][name]
    assert hub.asked_files() == {"tiny-Q4_K_M.gguf", "tiny-q8_0.gguf"}
    asked = len(hub.requests)
    assert child.resolve(f"{REPO}:Q8_0", offline=True)["folder"].endswith("tiny-q8_0.gguf")
    assert hub.requests[asked:] == []
    answer = child.resolve(f"{REPO}:BF16", offline=True)
    assert "ada/tiny:BF16 is not on disk" in answer["message"]
    assert "ada/tiny:tiny-q8_0.gguf" in answer["message"], "what is there is named"


def test_a_gguf_file_that_is_not_one(hub, child):
    hub.repos[REPO] = gguf_repo()
    assert (
        "has no GGUF file of the name or type 'Q5_0'. There are: mmproj-"
        in child.resolve(f"{REPO}:Q5_0")["message"]
    )
    several = child.resolve(f"{REPO}:BF16")["message"]
    assert "several GGUF files" in several and "mmproj-BF16.gguf, tiny-BF16.gguf." in several
    assert "It has GGUF files, for example ada/tiny:tiny-" in child.resolve(REPO)["message"]
    assert "organization/name:file.gguf" in child.resolve(f"{REPO}/tiny-BF16.gguf")["message"]
    assert child.resolve(f"{REPO}:")["error"] == "ConfigError"
    assert child.resolve("ada/none:Q4_0")["message"].startswith("The hub has no model ada/none")


def test_a_gguf_file_that_stopped_goes_on(hub, child):
    hub.repos[REPO] = gguf_repo()
    hub.damage = True
    assert "arrived damaged" in child.resolve(f"{REPO}:Q4_K_M")["message"]
    hub.damage = False
    assert child.resolve(f"{REPO}:Q4_K_M")["folder"].endswith("tiny-Q4_K_M.gguf")
