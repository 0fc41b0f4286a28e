"""Owns what an operator says of the process at the other end, and which frames the two exchange.

One computes prompts (role "prefill"), the other makes the answers (role "decode") and asks it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiny_llm.distributed.links import address_of
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError
from tiny_llm.limits import check_whole

ASK, BLOCKS, END, CANCEL = range(1, 5)
"""Kinds of frames. A prompt of which blocks from ``first`` on are wanted (``amount`` 0: none may go to disk):
its root, and its tokens. ``amount`` of these, from ``first`` on. No more of them. No more wanted."""
_FRAME_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Peer:
    """The other process: at ``address`` "HOST:PORT" role "prefill" listens, and "decode" connects to it.

    Both have the same ``secret``. Silence of ``timeout_s`` is the end of a connection, and a prompt waits as
    long for its next blocks; in all, once more for each 1,024 tokens. One that lacks fewer than
    ``least_tokens`` is not sent.

    Raises ConfigError for a value that cannot work.
    """

    address: str
    secret: str
    timeout_s: int = 10
    least_tokens: int = 64

    def __post_init__(self) -> None:
        check_whole("timeout_s (--peer-timeout)", self.timeout_s)
        check_whole("least_tokens", self.least_tokens)
        if not self.secret:
            raise ConfigError(
                "No secret is given for the peer; set TINY_LLM_PEER_SECRET to the same words on both sides."
            )
        address_of(self.address, "peer (--peer)")

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        return address_of(self.address, "peer")


def fingerprint(llm: LLM) -> bytes:
    """Of its keys and values. Raises ConfigError where other processes have some of them."""
    if not llm.engine.runner.is_whole:
        raise ConfigError("--role and --ranks: a model of several ranks can neither send nor take blocks.")
    return llm.fingerprint()


def blocks_of_frame(block_bytes: int) -> int:
    """How many blocks of that size go in one frame, at most."""
    return max(1, _FRAME_BYTES // block_bytes)
