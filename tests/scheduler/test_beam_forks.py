"""Beams fork at any token, over a scheduler and blocks that are real: everybody reads what is theirs."""

from __future__ import annotations

from array import array
from dataclasses import fields, replace
from itertools import count

import pytest
from languages import Found, Language, Letters, made_up, offered, searched

from tiny_llm.data import Advance, Sequence
from tiny_llm.decoding.answer import Answer
from tiny_llm.decoding.beam import BeamSearch
from tiny_llm.kv.blocks import BlockManager
from tiny_llm.sampling_params import BeamParams
from tiny_llm.scheduler.places import Place
from tiny_llm.scheduler.scheduler import Scheduler
from tiny_llm.scheduler.settings import SchedulerSettings

pytestmark = pytest.mark.chapter("4.3")


def test_a_branch_has_its_own_tokens_and_the_same_blocks() -> None:
    """It goes on where the other one is, two of whose tokens are not computed yet."""
    scheduler = Scheduler(BlockManager(4, 20), SchedulerSettings(ageing_s=100.0))
    tokens = array("i", [7, 8, 9, 8, 7])
    parent = Sequence(10, tokens, BeamParams(), 3, 50.0, 900.0, "salt", prompt_len=2)
    table = scheduler.blocks.table("salt")
    assert scheduler.blocks.allocate(table, parent.tokens) == 0
    scheduler.blocks.reserve(table, 3, 9)
    parent = replace(parent, num_computed_tokens=3, cached_tokens=2, status="running")
    entry = Place(parent, table, 100.0, 4)
    branch = scheduler._branch(entry, Advance(11, (5, 6)))
    assert parent.tokens.tolist() == [7, 8, 9, 8, 7] and branch.seq.tokens.tolist() == [7, 8, 9, 8, 7, 5, 6]
    own = {"id": 11, "tokens": branch.seq.tokens, "cached_tokens": 0}
    for name in (field.name for field in fields(Sequence)):
        assert getattr(branch.seq, name) == own.get(name, getattr(parent, name)), f"{name} is the other one's"
    assert branch.table.blocks.tolist() == table.blocks.tolist()[:1], "what is computed, and no room ahead"
    assert scheduler.blocks.reference_counts[table.blocks[0]] == 2
    assert branch.answers == 1 and branch.rank == (50.0 - 300.0, 11)


class Story:
    """Searches over a real scheduler and real blocks; it knows what every slot holds."""

    SIZE = 4

    def __init__(self, blocks: int = 200) -> None:
        self.manager = BlockManager(self.SIZE, blocks, prefix_cache=False)
        self.scheduler = Scheduler(self.manager)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.numbers = count(1)
        self.copied = 0

    def write(self) -> list[int]:
        """A step's pass: each token's slot gets the text up to it. Return whose next tokens it tells."""
        plan = self.plan = self.scheduler.schedule()
        for old, new in plan.copies:
            self.copied += 1
            self.slots |= {(new, slot): self.slots.get((old, slot), ()) for slot in range(self.SIZE)}
        for item in plan.items:
            sequence = self.scheduler.sequence(item.seq_id)
            assert sequence is not None
            text = tuple(sequence.tokens)
            for at in range(item.start + len(item.tokens)):
                place = item.block_table[at // self.SIZE], at % self.SIZE
                if at >= item.start:
                    self.slots[place] = text[: at + 1]
                assert self.slots[place] == text[: at + 1], (
                    f"sequence {item.seq_id} reads another one's token"
                )
        return [item.seq_id for item in plan.items if item.logit_rows]

    def searched(self, prompt: list[int], language: Language, params: BeamParams) -> Found:
        first = next(self.numbers)
        sequence = Sequence(first, array("i", prompt), params)
        self.scheduler.add(sequence)
        answer = Answer.begun(0, first, sequence, params, Letters([]), ())  # type: ignore[arg-type]
        search = BeamSearch(answer)
        for _ in range(params.max_tokens):
            told = self.write()
            by_id = {beam.seq_id: beam for beam in search.beams}
            for seq_id in told:
                search.take(offered(by_id[seq_id], language(tuple(by_id[seq_id].token_ids))))
            advances = search.advance(self.numbers) if search.is_ready else []
            going_on = {advance.seq_id for advance in advances}
            for seq_id in by_id if search.is_over else by_id.keys() - going_on:
                self.scheduler.cancel(seq_id)
            if search.is_over:
                return [(tuple(one.token_ids), one.score) for one in search.answers()]
            beams = {beam.seq_id: beam for beam in search.beams}
            held = [Advance(seq_id, ()) for seq_id in told]
            for one in self.scheduler.commit(self.plan, held, advances):
                if one.id in beams:
                    assert beams[one.id].tokens == one.tokens, "what is computed next is not the beam's"
                    beams[one.id].tokens = one.tokens
            self.scheduler.check_integrity()
        raise AssertionError("the search goes on though no answer may be longer")


@pytest.mark.parametrize("length", [3, 4, 5])
def test_beams_fork_at_any_token(length: int) -> None:
    """At each place of a block; everybody reads what is theirs, and at the end no block is held."""
    story = Story()
    for seed, width in enumerate((2, 4)):
        params = BeamParams(width=width, n=width, max_tokens=10)
        prompt = [9] * length
        found = story.searched(prompt, made_up(seed), params)
        assert found == searched(made_up(seed), width=width, n=width, max_tokens=10)
    assert story.manager.usage([]).used == 0, "a beam that was left behind holds its blocks"
    assert story.copied > 4, "copies on write"
