"""Beam search: by hand, against a plain search and against an exhaustive one."""

from __future__ import annotations

from itertools import count, product
from math import inf, log
from typing import Any, Literal

import pytest
from languages import Found, Language, begun, made_up, offered, searched, step

from tiny_llm.data import Advance
from tiny_llm.decoding.beam import BeamSearch
from tiny_llm.decoding.decide import NOTHING_LEFT
from tiny_llm.sampling_params import BeamParams, SamplingParams

pytestmark = pytest.mark.chapter("4.3")


class Counted:
    """A form that counts its tokens, and has a table that is too large to be copied."""

    def __init__(self, table: list[int] | None = None) -> None:
        self.seen, self.table = 0, [0] if table is None else table

    def __call__(self, tokens: list[int]) -> bytes:
        self.seen = len(tokens)
        return b"\1" * 5

    def __copy__(self) -> Counted:
        other = Counted(self.table)
        other.seen = self.seen
        return other

    def __deepcopy__(self, memo: object) -> Counted:
        raise AssertionError("a form's tables are shared: copy(), not deepcopy()")


def plain(
    language: Language,
    ends: tuple[int, ...] = (),
    *,
    width: int,
    n: int,
    max_tokens: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
) -> Found:
    """The same search, as transformers' rules say it: of tuples, with everything sorted."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, max_tokens + 1):
        ways = [(score + p, (*text, token)) for score, text in beams for token, p in language(text).items()]
        ways = sorted(ways, key=lambda way: -way[0])[: width * max(2, 1 + len(ends))]
        ended = [way[1][-1] in ends or length == max_tokens for way in ways]
        beams = [way for way, over in zip(ways, ended, strict=True) if not over][:width]
        found += [
            (score / length**length_penalty, text)
            for (score, text), over in zip(ways[:width], ended[:width], strict=False)
            if over
        ]
        found = sorted(found, key=lambda one: -one[0])[:width]
        if not beams:
            break
        if len(found) == width:
            far = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or beams[0][0] / far**length_penalty <= found[-1][0]:
                break
    rest = [(score / length**length_penalty, text) for score, text in beams]
    return [(text, score) for score, text in (found + rest)[:n]]


def by_table(**rows: dict[int, float]) -> Language:
    """A language by hand: probabilities by the letters so far, after "" those of the first token."""
    known = {name.strip("_"): {token: log(p) for token, p in row.items()} for name, row in rows.items()}
    return lambda text: known["".join(chr(ord("a") + token) for token in text)]


TRAP = by_table(
    _={1: 0.6, 2: 0.4},
    b={1: 0.4, 2: 0.35, 3: 0.25},
    c={1: 0.9, 2: 0.1},
)
"""Who takes the likeliest first token gets no further than 0.24; there is a text of 0.36."""


def test_a_beam_finds_what_the_likeliest_token_misses() -> None:
    assert searched(TRAP, width=1, max_tokens=2, length_penalty=0) == [((1, 1), pytest.approx(log(0.24)))]
    found = searched(TRAP, width=2, n=2, max_tokens=2, length_penalty=0)
    assert found == [((2, 1), pytest.approx(log(0.36))), ((1, 1), pytest.approx(log(0.24)))]


def test_a_copy_goes_its_own_way() -> None:
    """Whatever is done to one, the other is as it was: tokens, text, counts, form, log-probabilities."""
    params = BeamParams(width=2, max_tokens=9, logprobs=1, stop=("bbb",), constraint=Counted)
    for first, second in ((0, 1), (1, 0)):
        old = begun(params)
        old.push(1, {1: -0.5})
        old.tokens.append(1)
        assert old.form is not None
        old.form([1])
        old.score = -0.5
        new = old.copy(3, 44)
        assert (new.index, new.seq_id, new.score) == (3, 44, -0.5) and (old.index, old.seq_id) == (0, 10)
        assert (new.request_id, new.prompt_len, new.candidates) == (10, 3, old.candidates)
        changed, kept = ((old, new)[i] for i in (first, second))
        changed.push(1, {1: -0.25})
        changed.tokens.append(1)
        assert changed.form is not None and kept.form is not None
        changed.form([1, 1])
        changed.score = -0.75
        assert kept.token_ids == [1] and kept.logprobs == [{1: -0.5}] and kept.score == -0.5, "told too much"
        assert kept.checker.num_tokens == 1 and kept.history.answer == {1: 1} and not kept.ended
        assert kept.form.seen == 1 and kept.form.table is changed.form.table  # type: ignore[attr-defined]
        assert kept.checker._detokenizer.seen == [1]  # type: ignore[attr-defined]
        assert kept.push(2, None) == "bc", "a stop string that the other one began"
        assert not changed.ended and changed.push(1, None) == "" and changed.ended, "bbb ends it"


def test_a_copy_without_a_form() -> None:
    old = begun(SamplingParams(max_tokens=3))
    new = old.copy(1, 11)
    assert new.form is None and new.tokens == old.tokens and new.tokens is not old.tokens


def test_the_best_continuations_are_of_all_beams() -> None:
    """So many that a beam is left for each place, however many end: twice the width, or more of more ends."""
    search, numbers = BeamSearch(begun(BeamParams(width=2, max_tokens=9))), count(11)
    step(search, TRAP, numbers)
    assert [beam.token_ids for beam in search.beams] == [[1], [2]], "the best one first"
    for beam in search.beams:
        search.take(offered(beam, TRAP(tuple(beam.token_ids))))
    best = search._best_continuations()
    assert [(round(score, 6), beam.token_ids, token) for score, beam, token in best] == [
        (round(log(p), 6), [beam], token)
        for p, beam, token in ((0.36, 2, 1), (0.24, 1, 1), (0.21, 1, 2), (0.15, 1, 3))
    ]
    assert all(beam in search.beams for _, beam, _ in best), "the beams themselves"


@pytest.mark.parametrize(("ends", "most"), [((), 4), ((3,), 4), ((2, 3), 6), ((1, 2, 3), 8)])
def test_how_many_continuations_there_are(ends: tuple[int, ...], most: int) -> None:
    search = BeamSearch(begun(BeamParams(width=2, max_tokens=9), ends))
    search._likeliest[10] = {token: -float(token + 1) for token in range(12)}
    best = search._best_continuations()
    assert [token for _, _, token in best] == [*range(most)]


def test_what_is_impossible_is_no_continuation() -> None:
    search = BeamSearch(begun(BeamParams(width=2, max_tokens=9)))
    search._likeliest[10] = {2: -1.0, 0: -inf, 1: -inf}
    assert [token for _, _, token in search._best_continuations()] == [2]


def test_scores_that_are_nearly_equal_are_not() -> None:
    search = BeamSearch(begun(BeamParams(width=2, max_tokens=9)))
    search._likeliest[10] = {1: -1.0, 2: -1.0 + 1e-9, 3: -1.0 + 1e-6}
    assert [token for _, _, token in search._best_continuations()] == [3, 2, 1]


def test_of_equal_scores_the_better_beam_goes_first() -> None:
    """And of one beam the token that it names first. All sums here are exact."""
    search, numbers = BeamSearch(begun(BeamParams(width=2, max_tokens=9))), count(11)
    search.take(offered(search.beams[0], {1: -1.0, 2: -2.0}))
    search.advance(numbers)
    search._likeliest = {10: {4: -2.0, 3: -2.0}, 11: {0: -1.0, 2: -1.0}}
    assert [(beam.seq_id, token) for _, beam, token in search._best_continuations()] == [
        (10, 4),
        (10, 3),
        (11, 0),
        (11, 2),
    ]
    assert search.advance(numbers) == [Advance(10, (4,), None, (Advance(12, (3,)),))]


def test_a_first_continuation_stays_where_it_is() -> None:
    """Others are forks, of sequences with new numbers; a beam that nobody continues is in no advance."""
    search, numbers = BeamSearch(begun(BeamParams(width=3, max_tokens=9))), count(11)
    first = search.beams[0]
    search.take(offered(first, {1: -1.0, 2: -2.0, 3: -3.0, 4: -9.0}))
    assert search.is_ready
    assert search.advance(numbers) == [
        Advance(10, (1,), None, (Advance(11, (2,)), Advance(12, (3,)))),
    ]
    assert [(b.seq_id, b.token_ids, b.score) for b in search.beams] == [
        (10, [1], -1.0),
        (11, [2], -2.0),
        (12, [3], -3.0),
    ]
    assert first.token_ids == [] and first.checker.num_tokens == 0, (
        "a beam that others come of is not changed"
    )
    assert not search._likeliest and not search.is_ready, "what was said of the last token holds no more"
    for beam, likeliest in zip(search.beams, ({1: -8.0}, {1: -1.5, 2: -2.0}, {4: -0.25}), strict=True):
        assert not search.is_ready
        search.take(offered(beam, likeliest))
    assert search.advance(numbers) == [Advance(12, (4,)), Advance(11, (1,), None, (Advance(13, (2,)),))]
    assert [(b.seq_id, b.token_ids) for b in search.beams] == [(12, [3, 4]), (11, [2, 1]), (13, [2, 2])]
    assert next(numbers) == 14, "a number is taken for a fork and for nothing else"


def test_an_end_is_an_answer_only_among_the_best() -> None:
    """One that ranks behind the width is neither found nor a beam; one that is found is no beam any more."""
    search, numbers = (
        BeamSearch(begun(BeamParams(width=2, max_tokens=9, length_penalty=0), (3, 4))),
        count(11),
    )
    search.take(offered(search.beams[0], {3: -1.0, 1: -2.0, 4: -3.0, 2: -4.0}))
    assert search.advance(numbers) == [Advance(10, (1,), None, (Advance(11, (2,)),))]
    assert [(one.token_ids, one.score) for one in search._found] == [([3], -1.0)]
    assert [beam.token_ids for beam in search.beams] == [[1], [2]]


def test_a_first_continuation_that_ends_takes_no_sequence() -> None:
    search, numbers = BeamSearch(begun(BeamParams(width=1, max_tokens=9), (3,))), count(11)
    search.take(offered(search.beams[0], {3: -1.0, 2: -2.0}))
    assert search.advance(numbers) == [Advance(10, (2,))] and next(numbers) == 11


def test_a_beam_reports_what_was_asked_for() -> None:
    search, numbers = BeamSearch(begun(BeamParams(width=2, max_tokens=9, logprobs=1))), count(11)
    step(search, TRAP, numbers)
    assert [set(beam.logprobs[0]) for beam in search.beams] == [{1}, {1, 2}]


def test_a_score_is_over_a_power_of_the_length() -> None:
    """The end token counts. 0 is the sum itself, and below 0 long answers are punished."""
    for penalty, expected in ((0.0, -6.0), (1.0, -2.0), (0.5, -6 / 3**0.5), (-1.0, -18.0)):
        search = BeamSearch(begun(BeamParams(width=2, max_tokens=9, length_penalty=penalty), (4,)))
        answer = search.beams[0]
        for token in (1, 1, 4):
            answer = search._grown(answer, token, -6.0) if answer.tokens else answer
            search._likeliest[answer.seq_id] = {}
        search._keep(answer)
        assert search._found == [answer] and answer.score == pytest.approx(expected)


def test_of_what_is_found_the_best_stay() -> None:
    """By their final scores; of equal ones those that came first."""
    search = BeamSearch(begun(BeamParams(width=2, n=2, max_tokens=9, length_penalty=1)))
    kept = []
    for tokens, score in (([1], -3.0), ([2, 2], -4.0), ([3], -1.0), ([4, 4], -4.0), ([0], -9.0)):
        answer = begun(BeamParams(max_tokens=9))
        for token in tokens:
            answer.push(token, None)
            answer.tokens.append(token)
        answer.score = score
        search._keep(answer)
        kept.append([(one.token_ids, one.score) for one in search._found])
    assert kept == [
        [([1], -3.0)],
        [([2, 2], -2.0), ([1], -3.0)],
        [([3], -1.0), ([2, 2], -2.0)],
        [([3], -1.0), ([2, 2], -2.0)],
        [([3], -1.0), ([2, 2], -2.0)],
    ]


def ended_at(scores: list[float], params: BeamParams, *, best: float, length: int) -> BeamSearch:
    """A search that has found answers with these final scores; its best beam has ``length`` tokens."""
    search = BeamSearch(begun(params))
    for score in scores:
        search._found.append(begun(params))
        search._found[-1].score = score
    beams = [begun(params, seq_id=seq_id) for seq_id in (10, 11)]
    for beam, score in zip(beams, (best, best - 50.0), strict=True):
        beam.score = score
        for _ in range(length):
            beam.push(1, None)
    search.beams = beams
    return search


@pytest.mark.parametrize(
    ("rule", "penalty", "best", "over"),
    [
        (True, 1.0, -0.1, True),  # however good the beam is
        (False, 1.0, -7.9, False),  # -1.975 a token: better than the last one found
        (False, 1.0, -8.0, True),  # as good is not better
        (False, 1.0, -8.1, True),
        (False, 0.0, -1.9, False),
        (False, 0.0, -2.1, True),
        (False, -1.0, -0.6, True),  # times 4
        (False, -1.0, -0.4, False),
        ("never", 1.0, -8.1, False),  # at 10 tokens it could be -0.81
        ("never", 1.0, -19.9, False),
        ("never", 1.0, -20.1, True),
        ("never", 0.0, -2.1, True),
        ("never", -1.0, -0.4, False),  # it can only fall: at 4 tokens it is best
        ("never", -1.0, -0.6, True),
    ],
)
def test_when_a_search_is_over(rule: Any, penalty: float, best: float, over: bool) -> None:
    params = BeamParams(width=2, max_tokens=10, length_penalty=penalty, early_stopping=rule)
    search = ended_at([-1.0, -2.0], params, best=best, length=4)
    assert search.is_over is over
    assert ended_at([-2.0], params, best=best, length=4).is_over is False, "fewer than the width are found"
    assert search.beams[0].score == best and [one.score for one in search._found] == [-1.0, -2.0], (
        "it only looks"
    )


def test_without_beams_or_with_an_error_it_is_over() -> None:
    search = ended_at([], BeamParams(width=2, max_tokens=10), best=-1.0, length=1)
    assert not search.is_over
    search.error = "a fault"
    assert search.is_over
    search.error, search.beams = None, []
    assert search.is_over


def test_a_beam_with_nothing_left_dies_alone() -> None:
    search, numbers = BeamSearch(begun(BeamParams(width=2, n=2, max_tokens=9))), count(11)
    step(search, TRAP, numbers)
    search.take(offered(search.beams[0], None, NOTHING_LEFT))
    search.take(offered(search.beams[1], {1: -1.0}))
    assert search.advance(numbers) == [Advance(11, (1,))] and search.error is None
    search.take(offered(search.beams[0], None, NOTHING_LEFT))
    assert search.advance(numbers) == [] and search.is_over
    assert search.error == NOTHING_LEFT, "all have died, and nothing is found"


@pytest.mark.parametrize("known", [None, "a fault"])
def test_one_beam_with_nothing_left(known: str | None) -> None:
    """An error that is there already is the one that is told."""
    search = BeamSearch(begun(BeamParams(width=1, max_tokens=9)))
    search.take(offered(search.beams[0], None, NOTHING_LEFT))
    search.error = known
    assert search.advance(count(11)) == [] and search.error == (known or NOTHING_LEFT)


def test_who_found_something_is_without_error_when_all_beams_die() -> None:
    search, numbers = BeamSearch(begun(BeamParams(width=2, n=2, max_tokens=9), (3,))), count(11)
    step(search, lambda _: {3: -1.0, 1: -2.0}, numbers)
    search.take(offered(search.beams[0], None, NOTHING_LEFT))
    assert search.advance(numbers) == [] and search.is_over and search.error is None
    first, second = search.answers()
    assert first.token_ids == [3] and (second.token_ids, second.score) == ([], -inf), "the rest are empty"
    assert [first.index, second.index] == [0, 1] and second.checker.num_tokens == 0


def test_answers_of_a_search_that_is_cut_short() -> None:
    """What is found goes first, whatever its score; behind it beams, with final scores."""
    params = BeamParams(width=3, n=3, max_tokens=9, length_penalty=1.0)
    search = ended_at([-7.0], params, best=-4.0, length=4)
    search.error = "cancelled"
    answers = search.answers()
    assert [answer.score for answer in answers] == [-7.0, -1.0, -13.5]
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert [answer.error for answer in answers] == ["cancelled"] * 3


def test_a_search_that_ends_before_its_first_token() -> None:
    search = BeamSearch(begun(BeamParams(width=3, n=2, max_tokens=9, length_penalty=1.0)))
    search.error = "cancelled"
    first, second = search.answers()
    assert (first.token_ids, first.score, second.score) == ([], 0.0, -inf)


def test_only_so_many_answers_as_were_asked_for() -> None:
    params = BeamParams(width=3, n=2, max_tokens=9, length_penalty=1.0)
    assert [one.score for one in ended_at([-1.0, -2.0, -3.0], params, best=-4.0, length=4).answers()] == [
        -1.0,
        -2.0,
    ]
    empty = BeamSearch(begun(params))
    empty.beams, empty.error = [], "a fault"
    answers = empty.answers()
    assert [(one.score, one.index, one.error) for one in answers] == [
        (-inf, 0, "a fault"),
        (-inf, 1, "a fault"),
    ]
    assert [one.seq_id for one in answers] == [10, 10] and answers[0] is not answers[1]
    assert empty._empty.score == 0.0


@pytest.mark.parametrize("rule", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-0.5, 0.0, 1.0, 2.5])
def test_a_search_is_the_plain_one(rule: Any, penalty: float) -> None:
    """Answers and scores, of widths 1 to 5, with no end, one, or two, in languages that are made up."""
    for seed, (width, ends) in enumerate(product((1, 2, 3, 5), ((), (0,), (1, 3)))):
        asked: dict[str, Any] = {
            "width": width,
            "n": max(1, width - 1),
            "max_tokens": 6,
            "early_stopping": rule,
        }
        expected = plain(made_up(seed), ends, length_penalty=penalty, **asked)
        found = searched(made_up(seed), ends, length_penalty=penalty, **asked)
        assert [text for text, _ in found] == [text for text, _ in expected], f"width {width}, ends {ends}"
        assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_wide_enough_it_finds_the_likeliest_of_all() -> None:
    language = made_up(3, vocab=3)
    texts = [*product(range(3), repeat=4)]
    scores = {t: sum(language(t[:i])[t[i]] for i in range(4)) for t in texts}
    found = searched(language, width=27, n=27, max_tokens=4, length_penalty=0)
    assert [text for text, _ in found] == sorted(texts, key=lambda text: -scores[text])[:27]
