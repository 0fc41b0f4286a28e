"""A model that answers at once from what its cache really holds: digests in place of keys and values.

Its next token is a function of every token before it, read through the block table.
"""

from __future__ import annotations

from tiny_llm.data import Plan, PlanItem, Sequence

SIZE = 4
"""Tokens of a block."""


def following(state: int, token: int) -> int:
    """What the cache holds at a position: a digest of all tokens up to there."""
    return hash((state, token))


def answer(state: int, branch: int) -> tuple[int, bool]:
    """The next token, and whether it ends the answer."""
    drawn = hash((state, branch, 5)) % 1009
    return drawn % 3, drawn % 53 == 0


def alone(seq: Sequence, branch: int) -> list[int]:
    """The answer that the request must get, whatever the traffic."""
    state = len(seq.salt)
    for token in seq.tokens[: seq.prompt_len]:
        state = following(state, token)
    made: list[int] = []
    ended = False
    while not ended and len(made) < seq.params.max_tokens:
        token, ended = answer(state, branch)
        made.append(token)
        state = following(state, token)
    return made


def survivors(states: list[int], width: int) -> list[tuple[int, int]]:
    """Which of a group's sequences go on, and with which token: (its place, token), the best ``width``."""
    found = [(hash((state, t, 13)), place, t) for place, state in enumerate(states) for t in range(3)]
    return [(place, token) for _, place, token in sorted(found)[:width]]


def group_alone(seq: Sequence) -> list[list[int]]:
    """The answers of a group that began with ``seq``, whatever the traffic."""
    state = len(seq.salt)
    for token in seq.tokens[: seq.prompt_len]:
        state = following(state, token)
    states, made = [state], [list[int]()]
    for _ in range(seq.params.max_tokens):
        chosen = survivors(states, seq.params.n)
        made = [made[place] + [token] for place, token in chosen]
        states = [following(states[place], token) for place, token in chosen]
    return made


class Group:
    """Sequences that go on together, as beams do: ``members`` in order, ``states`` of those that are held."""

    def __init__(self, first: Sequence) -> None:
        self.first = first
        self.members = [first.id]
        self.states: dict[int, int] = {}


class Model:
    """A paged cache of digests, and answers read from it."""

    def __init__(self, host_blocks: int) -> None:
        self.slots: list[int | None] = []
        self.host: list[int | None] = [None] * (host_blocks * SIZE)

    def move(self, plan: Plan) -> None:
        self.slots += [None] * (plan.num_blocks * SIZE - len(self.slots))
        for pairs, source, target in (
            (plan.swap_out, self.slots, self.host),
            (plan.copies, self.slots, self.slots),
            (plan.swap_in, self.host, self.slots),
        ):
            assert len({new for _, new in pairs}) == len(pairs), "two moves to one place"
            written: set[int] = set()
            for old, new in pairs:
                assert source is not target or old not in written, "what one copy writes, another reads"
                written.add(new)
                target[new * SIZE : (new + 1) * SIZE] = source[old * SIZE : (old + 1) * SIZE]
        del self.slots[plan.num_blocks * SIZE :]

    def spoil(self, item: PlanItem) -> None:
        """What a step writes for a sequence that has ended in the meantime."""
        slot = item.block_table[item.start // SIZE] * SIZE + item.start % SIZE
        if slot < len(self.slots):  # else the pool has shrunk
            self.slots[slot] = None

    def compute(self, item: PlanItem, seq: Sequence) -> list[int]:
        """Check the item's whole context, then add its tokens; returns the state after each of them."""
        state = len(seq.salt)
        for position, token in enumerate(seq.tokens[: item.start]):
            state = following(state, token)
            found = self.slots[item.block_table[position // SIZE] * SIZE + position % SIZE]
            assert found == state, f"sequence {seq.id} has lost position {position} of {item.start}"
        states = []
        for position, token in enumerate(item.tokens, item.start):
            state = following(state, token)
            self.slots[item.block_table[position // SIZE] * SIZE + position % SIZE] = state
            states.append(state)
        return states
