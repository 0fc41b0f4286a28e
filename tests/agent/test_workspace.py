"""Nothing outside of the workspace is read or written, whatever a path looks like or becomes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.agent import workspace as module
from tiny_llm.agent.workspace import FileAbsent, Workspace, digest_of, tree_digest
from tiny_llm.errors import ConfigError, RequestError

pytestmark = pytest.mark.chapter("3.8")

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
    (outside.parent / "deep").mkdir()
    (outside.parent / "deep" / "key").write_bytes(SECRET)
    for path in ("file", "folder/key", "folder/deep/key", "in/up/file", "in/up/in/up/file"):
        with pytest.raises(RequestError, match="Links are not followed"):
            workspace.read(path)
        with pytest.raises(RequestError):
            workspace.write(path, b"x", digest_of(SECRET))
    with pytest.raises(RequestError):
        workspace.write("folder/new/key", b"x", "")
    assert workspace.files() == {}
    assert outside.read_bytes() == SECRET
    assert sorted(path.name for path in outside.parent.iterdir()) == ["deep", "key"], (
        "no folder is made there"
    )


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def opened() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.mark.usefixtures("quick")
def test_a_path_is_walked_from_the_open_folder(workspace: Workspace, outside: Path) -> None:
    """The folder may get another name, and another one its old name: it is the open one that counts."""
    (workspace.root / "a" / "b").mkdir(parents=True)
    (workspace.root / "a" / "b" / "c").write_bytes(b"ours")
    workspace.root.rename(workspace.root.parent / "moved")
    workspace.root.symlink_to(outside.parent)
    assert workspace.read("a/b/c") == b"ours"
    with pytest.raises(RequestError):
        workspace.read("key")
    workspace.write("sub/new", b"x", "")
    assert (workspace.root.parent / "moved" / "sub" / "new").read_bytes() == b"x" and not (
        outside.parent / "new"
    ).exists()


@pytest.mark.parametrize("when", ["before it is opened", "after it was opened"])
def test_a_link_put_there_at_the_worst_moment(
    workspace: Workspace, outside: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    (workspace.root / "real").mkdir()
    (workspace.root / "real" / "key").write_bytes(b"ours")
    real = os.open
    swapped: list[str] = []

    def swap() -> None:
        swapped.append("once")
        (workspace.root / "real").rename(workspace.root / "spare")
        (workspace.root / "real").symlink_to(outside.parent)

    def opens(path: str, *arguments: Any, **more: Any) -> int:
        if swapped or not str(path).endswith("real"):
            return real(path, *arguments, **more)
        if when == "before it is opened":
            swap()
            return real(path, *arguments, **more)
        found = real(path, *arguments, **more)
        swap()
        return found

    monkeypatch.setattr(os, "open", opens)
    if when == "after it was opened":
        assert workspace.read("real/key") == b"ours"
    else:
        with pytest.raises(RequestError, match="Links are not followed"):
            workspace.read("real/key")
    assert swapped


def test_what_is_absent_is_no_link_and_the_other_way(workspace: Workspace, outside: Path) -> None:
    (workspace.root / "link").symlink_to(outside)
    (workspace.root / "away").symlink_to("nowhere")
    (workspace.root / "file").write_bytes(b"x")
    for path in ("none", "none/key"):
        with pytest.raises(FileAbsent, match=f"{path} is not there"):
            workspace.read(path)
        assert workspace.digest(path) == ""
    for path in ("link", "away", "file/key"):
        told = rf"^{path} cannot be used: \w[\w ]+\. Links are not followed\.$"
        with pytest.raises(RequestError, match=told) as caught:
            workspace.digest(path)
        assert not isinstance(caught.value, FileAbsent), path


def test_what_may_not_be_opened_is_not_absent(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    (workspace.root / "a").mkdir()
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(RequestError, match=r"a/b cannot be used: Permission denied\.") as caught:
        workspace.digest("a/b")
    assert not isinstance(caught.value, FileAbsent)


@pytest.mark.usefixtures("quick")
def test_nothing_is_left_open(workspace: Workspace) -> None:
    (workspace.root / "a" / "b").mkdir(parents=True)
    (workspace.root / "a" / "b" / "c").write_bytes(b"x")
    (workspace.root / "a" / "link").symlink_to("b")
    before = opened()
    assert workspace.read("a/b/c") == b"x"
    workspace.write("a/b/d", b"y", "")
    for path in ("a/b/none", "a/none/c", "a/link/c", "a/b/c/d"):
        with pytest.raises(RequestError):
            workspace.read(path)
    with pytest.raises(RequestError):
        workspace.write("a/b/c", b"y", "another")
    assert opened() == before


def test_who_reads_makes_no_folders(workspace: Workspace) -> None:
    for path in ("a/b", "a/b/c"):
        assert workspace.digest(path) == ""
        with pytest.raises(FileAbsent):
            workspace.read(path)
    assert list(workspace.root.iterdir()) == []


def test_a_write_is_there_before_it_takes_the_place(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each moment at which power could be cut, the file is the old one or the new one, and whole."""
    (path := workspace.root / "a").write_bytes(b"old")
    path.chmod(0o466)
    data = b"new\r\n\0\xff"
    seen: list[tuple[str, bytes, bytes]] = []
    replace = os.replace

    def noted(what: str) -> None:
        halves = [one for one in workspace.root.iterdir() if one.name != "a"]
        assert len(halves) <= 1, "one file beside it"
        half = halves[0].read_bytes() if halves else b""
        seen.append((what, path.read_bytes(), half))
        if what == "replace":
            assert halves[0].stat().st_mode & 0o777 == 0o466, "with the mode of the old one"

    def replaced(*names: Any, **folders: Any) -> None:
        noted("replace")
        replace(*names, **folders)

    monkeypatch.setattr(os, "fsync", lambda _: noted("sync"))
    monkeypatch.setattr(os, "replace", replaced)
    workspace.write("a", data, digest_of(b"old"))
    assert seen == [("sync", b"old", data), ("replace", b"old", data), ("sync", data, b"")]
    assert path.read_bytes() == data


@pytest.mark.usefixtures("quick")
def test_what_a_kill_left_half_written_is_in_nobodys_way(workspace: Workspace, outside: Path) -> None:
    half = workspace.root / module._HALF
    half.write_bytes(b"ha")
    assert workspace.files() == {}, "it is no part of the workspace"
    workspace.write("a", b"whole", "")
    assert workspace.read("a") == b"whole" and not half.exists()
    half.symlink_to(outside)
    workspace.write("a", b"again", digest_of(b"whole"))
    assert workspace.read("a") == b"again" and outside.read_bytes() == SECRET, "nor can it lead out"


def test_a_half_that_somebody_else_makes_is_not_written(
    workspace: Workspace, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another name of a file outside, put there at the worst moment: what is written has to be a new file."""
    real = os.open

    def opens(path: str, *arguments: Any, **more: Any) -> int:
        if path == module._HALF:
            (workspace.root / module._HALF).hardlink_to(outside)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", opens)
    with pytest.raises(RequestError, match="File exists"):
        workspace.write("a", b"x", "")
    assert outside.read_bytes() == SECRET and list(workspace.root.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_write_that_failed_leaves_all_as_it_was(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace.root / "a").write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RequestError, match="No space left"):
        workspace.write("a", b"new", digest_of(b"old"))
    assert [path.name for path in workspace.root.iterdir()] == ["a"]
    assert workspace.read("a") == b"old"


@pytest.mark.usefixtures("quick")
def test_the_digest_before_is_the_files_own(workspace: Workspace) -> None:
    workspace.write("a", b"one", "")
    assert (workspace.root / "a").stat().st_mode & 0o777 == 0o644
    for before in ("", digest_of(b"two"), digest_of(b"one").upper()):
        with pytest.raises(RequestError, match="a was changed meanwhile"):
            workspace.write("a", b"two", before)
    with pytest.raises(RequestError, match="b was changed meanwhile"):
        workspace.write("b", b"two", digest_of(b"one"))
    assert workspace.read("a") == b"one" and sorted(workspace.files()) == ["a"]
    assert [path.name for path in workspace.root.iterdir()] == ["a"]
    workspace.write("a", b"", digest_of(b"one"))
    assert workspace.read("a") == b"" and workspace.digest("a") == digest_of(b"")


@pytest.mark.usefixtures("quick")
def test_a_refused_write_makes_no_folder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    for path, data in ((".git/hooks/x", b"x"), ("a/b", b"x" * 11), ("../a", b"x"), ("a/.venv/x", b"x")):
        with pytest.raises(RequestError):
            workspace.write(path, data, "")
    assert list(workspace.root.iterdir()) == []
    workspace.write("a/b", b"x" * 10, "")
    assert workspace.read("a/b") == b"x" * 10


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
