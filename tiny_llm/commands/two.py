"""Owns the options of a server that is one of two: one computes prompts, the other makes the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.errors import ConfigError
from tiny_llm.options import option
from tiny_llm.scheduler.settings import MAX_NUM_BATCHED_TOKENS
from tiny_llm.server.decode_side import DecodeSide
from tiny_llm.server.peer import Peer
from tiny_llm.server.prefill_side import PrefillSide

PROMPT_TOKENS = 1024
"""Of a step, at least, for prompts."""
_PREFILL_TOKENS = 256
_PANEL = "Two processes"


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Which part a server has, and where it finds the other."""

    role: Annotated[
        Literal["prefill", "decode"] | None,
        option(
            _PANEL, "prefill: also compute prompts for another server; decode: have long ones computed there."
        ),
    ] = None
    peer: Annotated[
        str | None, option(_PANEL, "HOST:PORT where role prefill listens, and decode finds it.")
    ] = None
    peer_secret: Annotated[str, option(_PANEL, "What both must know.", envvar="TINY_LLM_PEER_SECRET")] = ""
    peer_timeout: Annotated[
        int, option(_PANEL, "Seconds without news after which a prompt is computed at home.")
    ] = 10

    def step_tokens(self, sequences: int) -> int:
        """Tokens of a step: one for each of the sequences, the rest for prompts.

        Few where those are all there is: a short prompt waits for the step of a long one.
        """
        if self.role == "prefill":
            return sequences + _PREFILL_TOKENS
        return max(MAX_NUM_BATCHED_TOKENS, sequences + PROMPT_TOKENS)

    def joined(self, load: Callable[[], AsyncLLM]) -> Callable[[], AsyncLLM]:
        """``load``, and its part is taken. Raises ConfigError, now or when it is called."""
        if (self.role is None) != (self.peer is None):
            raise ConfigError(
                "--role and --peer go together: which part this server has, and where the two meet."
            )
        if self.peer is None:
            return load
        peer, side = Peer(self.peer, self.peer_secret, self.peer_timeout), self.role

        def both() -> AsyncLLM:
            llm = load()
            (PrefillSide if side == "prefill" else DecodeSide)(llm, peer)
            return llm

        return both


ALONE = PeerOptions()
