"""Units of work: every row once for each measure, on some rank; and what tells one evaluation from another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agsel.evaluation.answers import GSM8K, NUMBER, judge_by_pattern
from agsel.evaluation.questions import Example, Question
from agsel.evaluation.work import Part, Unit, put_together, share_of

EXAMPLES = [Example([3] * size, [3] * size + [4], [False] * size + [True]) for size in (1, 5, 2)]
QUESTIONS = [Question(number, "asked", "said 7", example) for number, example in enumerate(EXAMPLES)]
PART = Part("rows", EXAMPLES, QUESTIONS, judge_by_pattern(NUMBER), ("Q:",), 9)


def test_an_evaluation_is_told_by_all_that_its_results_depend_on() -> None:
    assert PART.fingerprint() == replace(PART, judge=judge_by_pattern(NUMBER)).fingerprint()
    others = [
        replace(PART, judge=judge_by_pattern(r"\w")),
        replace(PART, judge=GSM8K),
        replace(PART, judge=None),
        replace(PART, stop=()),
        replace(PART, max_new_tokens=8),
        replace(PART, examples=EXAMPLES[::-1]),
        replace(PART, questions=[question._replace(completion="said 8") for question in QUESTIONS]),
        replace(PART, name="gsm8k"),
    ]
    prints = [PART.fingerprint(), *(other.fingerprint() for other in others)]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_unit_is_done_by_one_rank(ranks: int) -> None:
    numbers = [4, 0, 7, 2, 9]
    done = [number for rank in range(ranks) for number in share_of(numbers, rank, ranks)]
    assert sorted(done) == sorted(numbers)


def test_results_find_their_rows() -> None:
    text = Part("text", EXAMPLES[:1])
    units = [Unit("losses", 0, [1, 2]), Unit("losses", 1, [0]), Unit("texts", 0, [2, 0, 1]), Unit("losses", 0, [0])]
    results = {
        0: [{"loss": 1.0}, {"loss": 2.0}],
        1: [{"loss": 9.0}],
        2: [{"generated": "two"}, {"generated": "zero"}, {"generated": "one"}],
        3: [{"loss": 0.0}],
    }
    assert put_together([PART, text], units, results) == [
        [{"loss": 0.0, "generated": "zero"}, {"loss": 1.0, "generated": "one"}, {"loss": 2.0, "generated": "two"}],
        [{"loss": 9.0}],
    ]
