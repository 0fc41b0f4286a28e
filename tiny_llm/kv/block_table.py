"""Owns where one sequence's tokens are kept, as numbers of blocks. Decides nothing."""

from __future__ import annotations

from array import array
from sys import maxsize


class BlockTable:
    """Where one sequence's tokens are kept. Read it; only the BlockManager writes it.

    Positions below ``writable`` can be written without asking again. At ``full_at`` tokens
    the next block is full, to be registered. ``host`` has the host slots while swapped out.
    With a ``window``, no row sees more than so many of the last tokens, and the first ``gone`` blocks
    are its own no more: block 0 stands in their place, and is not read there.
    """

    __slots__ = (
        *("blocks", "full_at", "gone", "host", "host_tokens", "is_kept", "names", "root", "window"),
        "writable",
    )

    def __init__(self, root: bytes, *, is_kept: bool = True, window: int = 0) -> None:
        self.root = root
        self.is_kept = is_kept  # on disk, too, once they leave the pool
        self.window = window
        self.gone = 0
        self.blocks = array("i")
        self.names: list[bytes] = []  # of its full blocks, as far as needed
        self.full_at = maxsize
        self.writable = 0
        self.host: list[int] = []
        self.host_tokens = 0

    @property
    def held(self) -> array[int]:
        """The blocks that are its own."""
        return self.blocks[self.gone :]

    def before(self, index: int) -> bytes:
        """The name of what block ``index`` follows."""
        return self.names[index - 1] if index else self.root
