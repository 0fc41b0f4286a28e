"""Nothing outside of the workspace is read or written, whatever a path looks like or becomes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tiny_llm.agent import workspace as module
from tiny_llm.agent.workspace import Workspace, digest_of, tree_digest
from tiny_llm.errors import ConfigError, RequestError

SECRET = b"secret"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file beside the workspace."""
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "key"
    path.write_bytes(SECRET)
    return path


WAYS_OUT = (
    "../outside/key",
    "a/../../outside/key",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a//b",
    "./../x",
    "a/.",
    "x\0y",
)


@pytest.mark.parametrize("path", [*WAYS_OUT, "a" * 2000])
def test_a_path_that_leaves_is_refused(workspace: Workspace, outside: Path, path: str) -> None:
    for act in (
        lambda: workspace.read(path),
        lambda: workspace.write(path, b"x", ""),
        lambda: workspace.digest(path),
    ):
        with pytest.raises(RequestError, match="leads out of the workspace"):
            act()
    assert outside.read_bytes() == SECRET


def test_no_link_is_followed_at_any_place_of_a_path(workspace: Workspace, outside: Path) -> None:
    (workspace.root / "file").symlink_to(outside)
    (workspace.root / "folder").symlink_to(outside.parent)
    (workspace.root / "in").mkdir()
    (workspace.root / "in" / "up").symlink_to("..")
    for path in ("file", "folder/key", "in/up/file"):
        with pytest.raises(RequestError, match="Links are not followed"):
            workspace.read(path)
        with pytest.raises(RequestError):
            workspace.write(path, b"x", digest_of(SECRET))
    assert workspace.files() == {}
    assert outside.read_bytes() == SECRET


def test_a_link_put_in_place_of_a_folder_meanwhile_gets_nothing_out(
    workspace: Workspace, outside: Path
) -> None:
    """Another process swaps a folder and a link again and again: reads see the one file, or none."""
    (workspace.root / "real").mkdir()
    (workspace.root / "real" / "key").write_bytes(b"ours")
    link, real = workspace.root / "link", workspace.root / "real"
    link.symlink_to(outside.parent)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            os.rename(real, workspace.root / "spare")
            os.rename(link, real)
            os.rename(real, link)
            os.rename(workspace.root / "spare", real)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(500):
            try:
                assert workspace.read("real/key") == b"ours"
            except RequestError:
                continue
    finally:
        done.set()
        swapper.join()


def test_what_is_no_plain_file_is_not_read_and_does_not_block(workspace: Workspace) -> None:
    os.mkfifo(workspace.root / "pipe")
    (workspace.root / "folder").mkdir()
    before = len(os.listdir("/dev/fd"))
    for path in ("pipe", "folder"):
        with pytest.raises(RequestError, match=r"no plain file|cannot be used"):
            workspace.read(path)
    assert workspace.files() == {}
    assert len(os.listdir("/dev/fd")) == before, "nothing is left open"


def test_a_file_that_grows_is_read_to_the_bound_and_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is not believed: as much as may be is read, and one byte more."""
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    path = workspace.root / "log"
    path.write_bytes(b"x" * 1000)
    assert len(workspace.read("log")) == 1000
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(RequestError, match="too large"):
        workspace.read("log")
    with pytest.raises(RequestError, match="would have 1,001 bytes"):
        workspace.write("new", b"x" * 1001, "")


@pytest.mark.parametrize(("name", "most"), [("MAX_FILES", 3), ("MAX_BYTES", 30)])
def test_a_workspace_has_bounds(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(module, name, most)
    for number in range(4):
        (workspace.root / f"{number}").write_bytes(b"x" * 10)
    with pytest.raises(RequestError, match="grown beyond"):
        workspace.files()


def test_a_write_is_whole_keeps_the_mode_and_makes_folders(workspace: Workspace) -> None:
    workspace.write("a/b/c.sh", b"one", "")
    path = workspace.root / "a" / "b" / "c.sh"
    path.chmod(0o755)
    (workspace.root / "same").hardlink_to(path)
    workspace.write("a/b/c.sh", b"two", digest_of(b"one"))
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o755
    assert (workspace.root / "same").read_bytes() == b"one", "another name of the old file keeps what it had"
    assert sorted(workspace.files()) == ["a/b/c.sh", "same"], "nothing of the writing is left"


def test_what_changed_meanwhile_is_not_overwritten(workspace: Workspace) -> None:
    (workspace.root / "a").write_bytes(b"theirs")
    for before in (digest_of(b"mine"), ""):
        with pytest.raises(RequestError, match="changed meanwhile"):
            workspace.write("a", b"new", before)
    assert workspace.read("a") == b"theirs"


@pytest.mark.parametrize("path", [".git/hooks/pre-commit", "sub/.GIT/config", ".venv/bin/python"])
def test_what_others_run_is_not_changed(workspace: Workspace, path: str) -> None:
    with pytest.raises(RequestError, match="must not be changed"):
        workspace.write(path, b"x", "")
    assert not (workspace.root / path).exists()


def test_digests_tell_files_apart(workspace: Workspace) -> None:
    (workspace.root / "a").write_bytes(b"1")
    first = tree_digest(workspace.files())
    assert workspace.digest("a") == digest_of(b"1") and workspace.digest("b") == ""
    (workspace.root / "a").rename(workspace.root / "b")
    assert tree_digest(workspace.files()) != first


def test_a_workspace_is_a_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        Workspace(tmp_path / "none")
