"""How ranks find each other, what they say, and what is said when something is wrong."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tiny_llm.data import Join, Plan, PlanItem
from tiny_llm.distributed.links import MAX_FRAME, Link, accept, address_of, connect, listen
from tiny_llm.distributed.meeting import Ranks, launched, meet
from tiny_llm.distributed.messages import Begin, DoStep, Leave, Told, read, written
from tiny_llm.distributed.socket_group import SocketGroup
from tiny_llm.distributed.team import Team, Watch
from tiny_llm.errors import ConfigError, GroupError

PLAN = Plan(
    [
        PlanItem(7, array("i", [5, -1]), 3, array("i", [1, 2]), 1),
        PlanItem(8, array("i", [-2]), 9, array("i", [4]), 1),
    ],
    6,
    [(1, 2)],
    [(3, 4)],
    [(2, 5)],
    joins=[Join(array("i", [1]), array("i", [2, 3]), array("i", [0, 9]))],
)


def test_a_plan_arrives_as_it_left() -> None:
    told = read(written(DoStep.of(3, PLAN, drawn=2)), Told)
    assert (told.engine, told.drawn, told.plan) == (3, 2, PLAN)
    assert len(written(DoStep.of(3, Plan([PLAN.items[1]], 6, [], [], [])))) < 60


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        written(["DoStep", 1]),
        written(["Explode", 1]),
        written(Leave(0))[:-1],
        b"\x80\x04K\x01.",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(GroupError, match="cannot be read"):
        read(data, Told)


def pair() -> tuple[Link, Link]:
    a, b = socket.socketpair()
    return Link(a, "Rank 1"), Link(b, "Rank 0")


def test_a_length_that_no_message_has_is_not_waited_for() -> None:
    here, there = pair()
    there.socket.sendall((MAX_FRAME + 1).to_bytes(4, "little"))
    with pytest.raises(GroupError, match="announces 67,108,865 bytes, but at most 67,108,864"):
        here.receive()


def test_a_link_whose_other_side_is_gone_says_who_that_was() -> None:
    here, there = pair()
    there.socket.close()
    with pytest.raises(GroupError, match="Rank 1 is gone"):
        here.receive()


def met(secrets: tuple[bytes, bytes]) -> list[socket.socket]:
    listening, until = listen(("127.0.0.1", 0), "here"), time.monotonic() + 2
    with listening, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(connect, listening.getsockname()[:2], secrets[1], until)
        try:
            return [accept(listening, secrets[0], until if secrets[0] == secrets[1] else until - 1.5)]
        finally:
            coming.result().close()


def test_who_knows_the_secret_comes_in() -> None:
    (sock,) = met((b"one", b"one"))
    sock.close()


def test_who_does_not_is_told_so_and_nobody_else_is_disturbed() -> None:
    with pytest.raises(GroupError, match=r"another secret\. Give all the same TINY_LLM_RANK_SECRET"):
        met((b"one", b"another"))


def test_a_stranger_does_not_keep_others_out() -> None:
    with listen(("127.0.0.1", 0), "here") as listening:
        place = listening.getsockname()[:2]
        stranger = socket.create_connection(place)
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody\r\n" + b"X-Much: 0\r\n" * 20)
        until = time.monotonic() + 20
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(connect, place, b"one", until)
            accept(listening, b"one", until).close()
            coming.result().close()
        stranger.close()


def test_nobody_there_is_an_error_in_time() -> None:
    with listen(("127.0.0.1", 0), "here") as closed:
        place = closed.getsockname()[:2]
    with pytest.raises(GroupError, match=r"cannot be reached.* Was rank 0 started"):
        connect(place, b"one", time.monotonic() + 0.2)


def test_a_busy_place_is_named() -> None:
    said = r"ranks cannot meet at 127.0.0.1:\d+: .* Another group may be there"
    with listen(("127.0.0.1", 0), "here") as taken, pytest.raises(ConfigError, match=said):
        listen(taken.getsockname()[:2], "rank address (--rank-address)")


@pytest.mark.parametrize("text", ["", "here", "here:", ":7000", "here:seventy", "here:70000"])
def test_an_address_is_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        address_of(text, "rank address")


@pytest.mark.parametrize(
    "given, said",
    [
        ({"size": 0}, r"ranks \(--ranks\) is 0"),
        ({"timeout_s": 0}, r"--rank-timeout"),
        ({"address": "127.0.0.1:1"}, "say how many with --ranks"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Ranks(**given)


def test_ranks_on_machines_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINY_LLM_RANK_SECRET", raising=False)
    with pytest.raises(ConfigError, match="need a secret: set TINY_LLM_RANK_SECRET"):
        meet(Ranks(2, "127.0.0.1:0"), nobody)


def nobody(leader: str, secret: str) -> subprocess.Popen[bytes]:
    """A rank that ends at once."""
    return subprocess.Popen(["false"])


def test_a_rank_that_ends_before_it_comes_is_not_waited_for() -> None:
    with pytest.raises(GroupError, match="1 of 2 ranks are here; one ended with exit code 1"):
        meet(Ranks(2), nobody)


def test_ranks_that_do_not_come_are_waited_for_so_long() -> None:
    with pytest.raises(GroupError, match="1 of 3 ranks are here; the others did not come in time"):
        meet(Ranks(3, "127.0.0.1:0", secret="s", meet_s=0.1), nobody)


HOSTS = [["127.0.0.1:5000"], ["127.0.0.1:5001"]]


def environment(tmp_path: Path, hosts: object, rank: str = "1") -> dict[str, str]:
    path = tmp_path / "hosts.json"
    path.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    return {"MLX_RANK": rank, "MLX_HOSTFILE": str(path)}


def test_what_mlx_launch_says_is_taken(tmp_path: Path) -> None:
    assert launched({}) is None
    assert launched(environment(tmp_path, "", "0")) is None, "one alone has an empty file"
    first, second = (launched(environment(tmp_path, HOSTS, rank)) for rank in ("0", "1"))
    assert first is not None and second is not None
    assert (first.size, first.rank, first.address, first.leader, first.backend) == (
        2,
        0,
        "127.0.0.1:5000",
        None,
        "ring",
    )
    assert (second.rank, second.leader, second.secret) == (1, "127.0.0.1:5000", first.secret)


@pytest.mark.parametrize(
    "hosts, rank, said",
    [
        ("{", "0", "cannot be read as JSON"),
        ({"hosts": []}, "0", "holds no list of ranks"),
        ([["127.0.0.1"], ["127.0.0.1:5001"]], "0", "is '127.0.0.1', expected HOST:PORT"),
        ([HOSTS[0], HOSTS[0]], "0", "names a place twice"),
        (HOSTS, "2", "MLX_RANK is '2', but there are 2 ranks: expected 0 to 1"),
        (HOSTS, "first", "MLX_RANK is 'first'"),
    ],
)
def test_a_bad_hostfile_is_one_clear_error(tmp_path: Path, hosts: object, rank: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launched(environment(tmp_path, hosts, rank))


def test_a_hostfile_that_is_not_there_and_none_at_all() -> None:
    with pytest.raises(ConfigError, match="MLX_HOSTFILE is '/nowhere'"):
        launched({"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere"})
    with pytest.raises(ConfigError, match=r"neither MLX_HOSTFILE .* nor MLX_JACCL_COORDINATOR"):
        launched({"MLX_RANK": "0"})


class InThread:
    """A follower in a thread, as ``meet`` wants a process."""

    returncode = 0

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0

    def kill(self) -> None:
        """It leaves by itself."""


def team_of(size: int, follower: Callable[[Team], None], timeout_s: float = 20.0) -> Team:
    """Rank 0 of a team, whose other ranks do ``follower``."""

    def start(leader: str, secret: str) -> Any:
        def run() -> None:
            team = meet(Ranks(leader=leader, secret=secret, timeout_s=timeout_s), nobody)
            assert team is not None
            follower(team)

        return InThread(run)

    team = meet(Ranks(size, timeout_s=timeout_s), start)
    assert team is not None
    return team


def test_a_team_shares_tells_and_leaves() -> None:
    heard: list[object] = []

    def follower(team: Team) -> None:
        heard.append(team.share(team.rank))
        heard.append(team.hear())
        heard.append(team.hear())
        team.close()

    team = team_of(3, follower)
    assert team.share("leader") == ["leader", 1, 2]
    team.tell(begun := Begin(0, 16, "float32", 8, 0))
    team.close()
    assert sorted(map(str, heard)) == sorted(map(str, [["leader", 1, 2], begun, Leave(0)] * 2))


def test_what_differs_is_named_on_all_ranks() -> None:
    said: list[str] = []

    def follower(team: Team) -> None:
        with pytest.raises(GroupError) as caught:
            team.agree({"mlx": "0.32.4" if team.rank == 1 else "0.31.0"})
        said.append(str(caught.value))
        team.close()

    team = team_of(3, follower)
    with pytest.raises(GroupError) as caught:
        team.agree({"mlx": "0.32.4"})
    team.close()
    assert {*said, str(caught.value)} == {
        "Rank 2 has mlx 0.31.0, but rank 0 0.32.4: all ranks must be started alike, with the same model."
    }


def test_a_rank_that_gives_up_says_why_and_ends_it_for_all() -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def follower(team: Team) -> None:
        if team.rank == 1:
            team.give_up("there is no memory left")
        with pytest.raises(GroupError) as caught:
            team.hear()
        said.put(str(caught.value))
        team.close()

    team = team_of(3, follower)
    broken = threading.Event()
    team.when_broken(lambda why: broken.set())
    assert broken.wait(20)
    assert team.fault == "Rank 1: there is no memory left"
    team.close()
    for _ in range(2):
        assert "there is no memory left" in said.get(timeout=20)


def test_a_rank_that_is_lost_while_the_team_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch found its rank gone before the team had a watch to tell the others by."""
    start = threading.Thread.start

    def at_once(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "watch":
            thread.join(20)

    monkeypatch.setattr(threading.Thread, "start", at_once)
    (watched, lost), (third, hers) = pair(), pair()
    lost.socket.close()
    team = Team(SocketGroup(0, {}, 20.0), {}, {1: watched, 2: third}, 20.0)
    assert team.fault is not None and "Rank 1" in team.fault
    hers.socket.settimeout(20)
    while (said := hers.receive()) == b"":  # a sign of life
        pass
    assert said == team.fault.encode()
    team.close()


def test_a_rank_that_says_nothing_is_missed_in_time() -> None:
    here, _ = pair()
    told: list[str] = []
    over = threading.Event()

    def noted(why: str) -> None:
        told.append(why)
        over.set()

    watch = Watch({1: here}, 0.2, noted)
    watch.start()
    assert over.wait(20)
    watch.close()
    assert "Rank 1 has not been heard of for" in told[0] and "(--rank-timeout 0.2)" in told[0]
