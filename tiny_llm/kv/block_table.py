"""Owns where one sequence's tokens are kept, as numbers of blocks. Decides nothing."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from sys import maxsize


@dataclass(slots=True, eq=False)
class BlockTable:
    """Where one sequence's tokens are kept. Read it; only the BlockManager writes it.

    Positions below ``writable`` can be written without asking again. At ``full_at`` tokens
    the next block is full, to be registered. ``host`` has the host slots while swapped out.
    With a ``window``, no row sees more than so many of the last tokens, and the first ``gone`` blocks
    are its own no more: block 0 stands in their place, and is not read there.
    """

    root: bytes
    is_kept: bool = True  # on disk, too, once they leave the pool
    window: int = 0
    gone: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as needed
    full_at: int = maxsize
    writable: int = 0
    host: list[int] = field(default_factory=list)
    host_tokens: int = 0

    @property
    def held(self) -> array[int]:
        """The blocks that are its own."""
        return self.blocks[self.gone :]

    def before(self, index: int) -> bytes:
        """The name of what block ``index`` follows."""
        return self.names[index - 1] if index else self.root
