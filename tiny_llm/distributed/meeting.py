"""How ranks find each other: who is to be here, where they meet, and how that becomes a team.

All meet at rank 0's address and prove that they know the secret; then each two of them connect, or MLX does
it. Started by ``mlx.launch``, ranks are what it says; else rank 0 starts the others here, or waits for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from tiny_llm.distributed.links import Link, accept, address_of, connect, listen
from tiny_llm.distributed.messages import read, written
from tiny_llm.distributed.mlx_group import MlxBackend, MlxGroup
from tiny_llm.distributed.socket_group import SocketGroup
from tiny_llm.distributed.team import Team, end
from tiny_llm.errors import ConfigError, GroupError
from tiny_llm.limits import check_whole

SECRET = "TINY_LLM_RANK_SECRET"
MOST_RANKS = 64
_LOOPBACK = "127.0.0.1:0"
_LOOK_S = 0.2  # after the children
_MANY = 20  # times as long as a rank may be silent


@dataclass(frozen=True, slots=True)
class Ranks:
    """That ``size`` processes run a model together, and how they meet.

    ``address`` HOST:PORT is where rank 0 waits for the others; without one it starts them on this machine.
    ``leader``: this one is no rank 0, which waits there. They know the same ``secret``. One that is silent
    for ``timeout_s`` ends the group; ``meet_s`` is the time to come. ``backend`` is MLX's, and ``rank`` this
    one's, where ``mlx.launch`` says so. With ``shares`` of the work, one a rank, or none if they are all
    alike, each has some layers; None: each has a part of every matrix.
    """

    size: int = 1
    address: str | None = None
    timeout_s: float = 30.0
    leader: str | None = None
    secret: str | None = None
    meet_s: float = 120.0
    backend: MlxBackend | None = None
    rank: int | None = None
    shares: tuple[float, ...] | None = None

    @property
    def patience_s(self) -> float:
        """Seconds that arrays may be waited for: in a pipeline, as long as another rank does all its work."""
        return self.timeout_s if self.shares is None else _MANY * self.timeout_s

    def shares_of(self, size: int) -> tuple[float, ...] | None:
        """The shares of so many ranks. Raises ConfigError where they are not as many."""
        if self.shares is not None and len(self.shares or range(size)) != size:
            raise ConfigError(
                f"{len(self.shares)} shares are given (--shares), but there are {size} ranks: give each one."
            )
        return (1.0,) * size if self.shares == () else self.shares

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        check_whole("ranks (--ranks)", self.size, most=MOST_RANKS)
        if not 0.1 <= self.timeout_s <= 86_400:
            raise ConfigError(
                f"rank timeout (--rank-timeout) is {self.timeout_s!r}, expected seconds from 0.1 on."
            )
        if self.leader is None and self.address is not None and self.size == 1:
            raise ConfigError("--rank-address is where other ranks come to; say how many with --ranks.")


class _Hello(msgspec.Struct, frozen=True):
    purpose: Literal["plan", "watch", "data"]
    rank: int  # -1: whichever is free
    port: int = 0  # where this one can be reached for arrays


class _Welcome(msgspec.Struct, frozen=True):
    rank: int
    places: list[tuple[str, int]]  # of all ranks, for arrays; none where MLX carries them


def launched(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What ``mlx.launch`` says about this process; None where it has not started it, or alone.

    Raises ConfigError for what it says that cannot be.
    """
    if "MLX_RANK" not in environment:
        return None
    secret, told = environment.get(SECRET), ""
    backend: MlxBackend
    if coordinator := environment.get("MLX_JACCL_COORDINATOR"):
        backend, address, told = "jaccl", coordinator, coordinator
        size = len(_read_list("MLX_IBV_DEVICES", environment))
    elif "MLX_HOSTFILE" in environment:
        hosts = _read_list("MLX_HOSTFILE", environment)
        backend, size, told = "ring", len(hosts), json.dumps(hosts)
        all_places = [place for host in hosts for place in (host if isinstance(host, list) else [host])]
        for place in all_places:
            address_of(str(place), "MLX_HOSTFILE has a place that")
        if len(set(map(str, all_places))) < len(all_places):
            raise ConfigError("MLX_HOSTFILE names a place twice: each rank needs its own HOST:PORT.")
        address = str(all_places[0]) if all_places else ""
    else:
        raise ConfigError(
            "MLX_RANK is set, but neither MLX_HOSTFILE (ring) nor MLX_JACCL_COORDINATOR (jaccl) is."
        )
    text = environment["MLX_RANK"]
    if size < 2:
        return None
    if not text.isdecimal() or int(text) >= size:
        raise ConfigError(f"MLX_RANK is {text!r}, but there are {size} ranks: expected 0 to {size - 1}.")
    rank = int(text)
    return Ranks(
        size,
        address,
        leader=address if rank else None,
        secret=secret or hashlib.sha256(told.encode()).hexdigest(),
        backend=backend,
        rank=rank,
    )


def _read_list(name: str, environment: Mapping[str, str]) -> list[object]:
    path = environment.get(name, "")
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if text else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} is {path!r}, which cannot be read as JSON: {error}.") from None
    if not isinstance(found, list):
        raise ConfigError(f"{name} ({path}) holds no list of ranks.")
    return found


Start = Callable[[str, str], subprocess.Popen[bytes]]
"""(where rank 0 waits, the secret) -> a process that comes there."""


def meet(ranks: Ranks, start: Start) -> Team | None:
    """Wait until all are there. None for one alone.

    Raises ConfigError for an address that cannot be had, GroupError for who does not come.
    """
    until = time.monotonic() + ranks.meet_s
    if ranks.leader is not None:
        return _follow(ranks, ranks.leader, until)
    return _lead(ranks, start, until) if ranks.size > 1 else None


def _secret_of(ranks: Ranks) -> str:
    given = ranks.secret or os.environ.get(SECRET)
    if given is None and ranks.address is None and ranks.leader is None:
        return secrets.token_hex(32)
    if not given:
        raise ConfigError(f"Ranks on several machines need a secret: set {SECRET} to the same on all.")
    return given


def _lead(ranks: Ranks, start: Start, until: float) -> Team:
    secret = _secret_of(ranks)
    address = address_of(ranks.address or _LOOPBACK, "rank address (--rank-address)")
    with ExitStack() as undo:
        listening = listen(address, "rank address (--rank-address)")
        undo.callback(listening.close)
        children: list[subprocess.Popen[bytes]] = []
        if ranks.address is None:
            for _ in range(1, ranks.size):
                host, port = listening.getsockname()[:2]
                children.append(start(f"{host}:{port}", secret))
                undo.callback(end, children[-1])
        arrived = _Arrivals(listening, secret.encode(), ranks.size, children, until)
        plans: dict[int, Link] = {}
        places: dict[int, tuple[str, int]] = {0: ("", 0)}
        for hello, link in arrived.all_of("plan"):
            rank = hello.rank if hello.rank > 0 else len(plans) + 1
            if rank in plans or rank >= ranks.size:
                raise GroupError(f"Two processes came as rank {rank} of {ranks.size}: start each rank once.")
            link.who = f"Rank {rank}"
            plans[rank], places[rank] = link, (link.socket.getpeername()[0], hello.port)
        for rank, link in plans.items():
            sent = [] if ranks.backend else [places[one] for one in range(ranks.size)]
            link.send(written(_Welcome(rank, sent)))
        watched = {hello.rank: link for hello, link in arrived.all_of("watch")}
        if ranks.backend is None:
            data = {hello.rank: link.socket for hello, link in arrived.all_of("data")}
        listening.close()  # MLX wants the place, and who came there now would come to nobody
        for link in plans.values():
            link.send(b"")
        for rank, link in watched.items():
            link.who = f"Rank {rank}"
        group = MlxGroup(ranks.backend) if ranks.backend else SocketGroup(0, data, ranks.patience_s)
        undo.pop_all()
        return Team(group, plans, watched, ranks.timeout_s, children)


class _Arrivals:
    """Who comes to rank 0, in whatever order."""

    def __init__(
        self,
        listening: socket.socket,
        secret: bytes,
        size: int,
        children: Sequence[subprocess.Popen[bytes]],
        until: float,
    ) -> None:
        self._listening, self._secret, self._size = listening, secret, size
        self._children, self._until = children, until
        self._came: dict[str, list[tuple[_Hello, Link]]] = {"plan": [], "watch": [], "data": []}

    def all_of(self, purpose: str) -> list[tuple[_Hello, Link]]:
        """A link of each other rank. Raises GroupError if it does not come."""
        while len(self._came[purpose]) < self._size - 1:
            self._accept()
        return self._came[purpose]

    def _accept(self) -> None:
        now = time.monotonic()
        try:
            sock = accept(self._listening, self._secret, min(self._until, now + _LOOK_S))
        except TimeoutError:
            gone = [child.returncode for child in self._children if child.poll() is not None]
            if gone or now >= self._until:
                came = 1 + len(self._came["plan"])
                why = f"one ended with exit code {gone[0]}" if gone else "the others did not come in time"
                raise GroupError(f"{came} of {self._size} ranks are here; {why}.") from None
            return
        link = Link(sock, "A rank that comes")
        hello = read(link.receive(), _Hello)
        self._came[hello.purpose].append((hello, link))


def _follow(ranks: Ranks, leader: str, until: float) -> Team:
    secret, address = _secret_of(ranks).encode(), address_of(leader, "leader (--leader)")

    def come(place: tuple[str, int], hello: _Hello, who: int) -> Link:
        link = Link(connect(place, secret, until), f"Rank {who}")
        link.send(written(hello))
        return link

    rank = -1 if ranks.rank is None else ranks.rank
    link = Link(connect(address, secret, until), "Rank 0")
    with listen((link.socket.getsockname()[0], 0), "this rank's address") as own:
        link.send(written(_Hello("plan", rank, own.getsockname()[1])))
        welcome = read(link.receive(), _Welcome)
        rank, places = welcome.rank, [address, *welcome.places[1:]]
        watched = come(address, _Hello("watch", rank), 0)
        data: dict[int, socket.socket] = {}
        if ranks.backend is None:
            for other in range(rank):
                data[other] = come(places[other], _Hello("data", rank), other).socket
            while len(data) < len(places) - 1:
                late = Link(accept(own, secret, until), "A rank that comes")
                data[read(late.receive(), _Hello).rank] = late.socket
    link.receive()  # the word that rank 0 waits there no more
    group = MlxGroup(ranks.backend) if ranks.backend else SocketGroup(rank, data, ranks.patience_s)
    return Team(group, {0: link}, {0: watched}, ranks.timeout_s)
