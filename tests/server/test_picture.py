"""The engine's picture: every block, every sequence, no word of what was asked."""

from __future__ import annotations

import json
from base64 import b64decode
from collections import Counter

from tiny_llm.engine.llm import LLM
from tiny_llm.engine.settings import EngineSettings
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.live import CACHED, FREE, MAX_CELLS, MAX_ROWS, OWNED, SHARED, owner, picture

LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1, speculate=False)


def fresh(llm: LLM, blocks: int = 256, running: int = 256) -> LLM:
    limits = SchedulerSettings(max_num_seqs=running)
    return llm.with_engine(EngineSettings(kv_blocks=blocks, scheduler=limits))


def seen(llm: LLM) -> tuple[dict[str, object], Counter[int]]:
    taken = json.loads(json.dumps(picture(llm.engine)))
    return taken, Counter(b64decode(taken["cells"]))


def test_cells_agree_with_the_accounts_while_sequences_come_and_go(llm: LLM) -> None:
    one = fresh(llm)
    assert seen(one)[0]["rows"] == []
    for number in range(5):
        one.engine.add([7 + number] * 40, LONG)
    for _ in range(20):
        one.engine.step()
        taken, cells = seen(one)
        usage = one.engine.scheduler.usage()
        assert (cells[FREE], cells[CACHED]) == (usage.free, usage.cached)
        assert sum(cells.values()) == usage.capacity
        for row in taken["rows"]:  # type: ignore[attr-defined]
            assert cells[owner(row[0])] == row[7] > 0
    assert len(taken["rows"]) == 5  # type: ignore[arg-type]
    for number in range(1, 6):
        one.engine.cancel(number)
    taken, cells = seen(one)
    assert cells.keys() == {FREE, CACHED} and taken["rows"] == []
    assert taken["generation_tokens"] == one.engine.totals.generation_tokens > 0


def test_blocks_in_several_tables_are_shown_as_shared(llm: LLM) -> None:
    one = fresh(llm)
    one.engine.add([5] * 64, SamplingParams(max_tokens=50, ignore_eos=True, n=4, seed=1))
    for _ in range(4):
        one.engine.step()
    cells = seen(one)[1]
    assert cells[SHARED] == 4, "the prompt, which four answers go on from"
    assert len([cell for cell in cells if cell >= OWNED]) == 4


def test_rows_tell_who_waits_who_reads_and_who_answers(llm: LLM) -> None:
    one = fresh(llm, running=1)
    one.engine.add([5] * 40, LONG)
    one.engine.add([6] * 30, LONG)
    one.engine.step()
    one.engine.step()
    first, second = seen(one)[0]["rows"]  # type: ignore[misc]
    assert first[:4] == [1, 1, 40, first[4] - 1] and first[4] > 40 and first[5] == 240
    assert second == [2, 0, 30, 0, 30, 230, 0, 0]


def test_a_large_pool_and_many_sequences_are_told_in_brief(llm: LLM) -> None:
    one = fresh(llm, blocks=50_000)
    one.engine.scheduler.blocks.grow(3 * MAX_CELLS)
    for number in range(MAX_ROWS + 20):
        one.engine.add([number + 1] * 20, LONG)
    one.engine.step()
    taken, cells = seen(one)
    assert sum(cells.values()) == MAX_CELLS and len(taken["rows"]) == MAX_ROWS  # type: ignore[arg-type]
    assert taken["running"] + taken["waiting"] == MAX_ROWS + 20  # type: ignore[operator]
    assert len(json.dumps(taken)) < 12_000, "a few times a second, to each who watches"


def test_it_has_numbers_only(llm: LLM) -> None:
    one = fresh(llm)
    one.engine.add(one.tokenizer.encode("The password is zimbro."), LONG)
    one.engine.step()
    taken = picture(one.engine)
    assert [name for name, value in taken.items() if isinstance(value, str)] == ["cells"]
