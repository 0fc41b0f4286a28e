"""Owns how an engine's process comes to lead others that run the same model, and what it tells them.

Rank 0 schedules, draws and guesses; the others follow its plans (``follower``). Tokens of a plan that are
still being drawn reach them as exact integers, by the first collective of the step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from tiny_llm.data import Plan
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.distributed.meeting import SECRET, Ranks, Start, launched, meet
from tiny_llm.distributed.messages import Begin, DoStep, Forget, Order, WarmUp
from tiny_llm.distributed.team import Team
from tiny_llm.errors import ConfigError, GroupError
from tiny_llm.kv.paged import PagedCache
from tiny_llm.ops.backend import num_threads, set_threads
from tiny_llm.version import __version__ as version

_ALIKE = ("dtype", "quantize", "backend", "kernels", "same_tokens", "activations", "kv_dtype", "max_context")
_GIVEN = (*_ALIKE, "kv_memory", "offline", "threads")
_FLAGS: Mapping[str, str] = {"max_context": "--max-model-len"}


def gather(name: str, given: Mapping[str, Any]) -> Team | None:
    """Meet the other ranks of the model ``name``, by what an LLM is ``given``; None where there are none.

    Raises ConfigError for what several ranks cannot do, GroupError where not all come, or are not alike.
    """
    ranks = given["ranks"]
    if not isinstance(ranks, Ranks):
        ranks = (launched() or Ranks()) if ranks is None else Ranks(ranks)
    if ranks.size == 1 and ranks.leader is None:
        return None
    if given["kv_disk"] is not None:
        raise ConfigError("kv_disk (--kv-disk) is for one process, and cannot be given with ranks (--ranks).")
    if ranks.shares is not None and given["draft"] is not None:
        raise ConfigError("A draft model (--draft) is not for a pipeline of ranks (--parallel pipeline).")
    how = {one: given[one] for one in _GIVEN}
    if ranks.address is None and ranks.leader is None and how["threads"] is None:
        how["threads"] = max(1, (num_threads() or os.cpu_count() or 1) // ranks.size)  # of the same machine
        set_threads(how["threads"])
    team = meet(ranks, _starting(name, how, ranks))
    if team is not None:
        with held(team):
            team.shares = ranks.shares_of(team.size)
            same = {one: how[one] for one in _ALIKE}
            team.agree({"tiny_llm": version, "mlx": metadata.version("mlx"), "shares": team.shares, **same})
    return team


def _starting(name: str, how: Mapping[str, object], ranks: Ranks) -> Start:
    """What starts another rank on this machine, of the same options: ``python -m tiny_llm follow``."""

    def start(leader: str, secret: str) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-P", "-m", "tiny_llm", "follow", "--leader", leader, "--model", name]
        shares = None if not ranks.shares else ",".join(map(str, ranks.shares))
        own = {"parallel": "tensor" if ranks.shares is None else "pipeline", "shares": shares}
        for option, value in {**how, "rank_timeout": ranks.timeout_s, **own}.items():
            if value is not None and value is not False:
                command.append(_FLAGS.get(option, f"--{option.replace('_', '-')}"))
                command += [] if value is True else [str(value)]
        environment = {**os.environ, "PYTHONPATH": path, SECRET: secret}
        # In a session of its own Ctrl-C leaves it alone: rank 0 takes it along when it ends.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)

    return start


@contextmanager
def held(team: Team | None) -> Iterator[Group]:
    """Among the group's ranks: what fails in here is told to the others, and the team is over."""
    try:
        yield ALONE if team is None else team.group
    except BaseException as error:
        if team is None:
            raise
        what = team.why(error) if isinstance(error, GroupError) else str(error)
        team.give_up(what)
        team.close()
        if isinstance(error, GroupError):
            raise GroupError(what) from error
        raise


class Lead:
    """Rank 0's word to the others on one engine's pages and steps."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.groups = 1 if team.shares is None else team.size  # of sequences, where ranks work in turns
        self._engine = next(team.numbers)
        weakref.finalize(self, team.gone.append, self._engine)  # told with what comes next

    def begin(self, cache: PagedCache) -> None:
        """Have pages like these."""
        format = cache.format
        dtype = str(format.dtype).removeprefix("mlx.core.")
        self._tell(Begin(self._engine, format.block_size, dtype, cache.max_blocks, cache.host_blocks))

    def step(self, plan: Plan, drawn: mx.array | None = None) -> mx.array | None:
        """Do this. Returns ``drawn``, the same for all: other ranks bring zeros to it, and take ours."""
        self._tell(DoStep.of(self._engine, plan, 0 if drawn is None else drawn.size))
        return None if drawn is None else self.team.group.all_gather(drawn.astype(mx.int32))[: drawn.size]

    def warm_up(self, most_blocks: int) -> None:
        """Run what is to be compiled."""
        self._tell(WarmUp(self._engine, most_blocks))

    def fail(self, error: Exception) -> NoReturn:
        """A step failed: the others are somewhere in it, and nothing brings all to one place again."""
        is_ours = isinstance(error, GroupError)
        what = str(error) if is_ours else f"A step failed: {type(error).__name__}: {error}"
        self.team.give_up(what)
        raise GroupError(self.team.fault or what) from error

    def _tell(self, message: Order) -> None:
        while self.team.gone:
            self.team.tell(Forget(self.team.gone.pop()))
        self.team.tell(message)
