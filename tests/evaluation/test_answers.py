"""Answers inside of texts; those of MATH by math-verify, on rows of our own."""

from __future__ import annotations

import pickle

import pytest

from agsel.evaluation.answers import GSM8K, MATHS, NUMBER, extract_answer, gsm8k_answer, judge_by_pattern


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("He earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10", NUMBER, 10),
        ("#### 1,250", NUMBER, 1250),
        ("#### -3.50", NUMBER, -3.5),
        ("14 + 8 = 22, 22 - 5 = 17", NUMBER, 17),
        ("It costs $18.", NUMBER, 18),
        ("none", NUMBER, None),
        ("#### 12\nQuestion: 99", r"#### (\S+)", 12),
        ("The answer is (B) not (C)", r"\(([A-D])\)", "C"),
        ("#### 5 #### ", r"####(?: (\d+))?", None),
        ("so B, not C", r"(A)|(B)|(C)", "C"),
        ("the 5", r"(\d+)?", None),
        ("the 5", r"\d*", None),
        ("It lost -$5.", NUMBER, -5),
        ("half of it, .5", NUMBER, 0.5),
        ("it is nan", r"\w+$", "nan"),
        ("9" * 400, NUMBER, "9" * 400),
    ],
)
def test_an_answer_is_the_last_match(text: str, pattern: str, answer: float | str | None) -> None:
    assert extract_answer(text, pattern) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 + 4 = 7\n#### 7", 7),
        (" #### 7\nQuestion: 12 birds?\nAnswer: #### 12", 7),
        (" ####$1,000.50 and 3 more", 1000.5),
        (" #### -8", -8),
        (" #### .5", 0.5),
        (" #### -$5", -5),
        (" #### $-5", -5),
        (" ####\n9", 9),
        (" so it is 5, or 6", 6),
        (" #### many, perhaps 4", 4),
        (" nothing", None),
    ],
)
def test_gsm8k_counts_the_number_after_the_first_marks_else_the_last(text: str, answer: float | None) -> None:
    assert gsm8k_answer(text) == answer


@pytest.mark.parametrize("pattern", [r"(\d+)?", r"\d*"])
def test_a_pattern_that_matches_nothing_finds_no_answer_of_a_reference(pattern: str) -> None:
    judge = judge_by_pattern(pattern)
    assert not judge.has_answer("the 5")
    assert not judge.is_right("none", "the 5 of 7 at the")


def test_judgement_compares_the_last_numbers() -> None:
    judge = judge_by_pattern(NUMBER)
    pairs = [(" so 3", " 1 + 2 = 3"), (" 1000.0", " #### 1,000"), (" 3 or 4", " 3"), ("", " 3"), (" 03", " 3")]
    assert [judge.is_right(*pair) for pair in pairs] == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("judge", "bad", "remedy"),
    [
        (judge_by_pattern(r"\d"), "seven", "--answer_pattern"),
        (GSM8K, "#### ", "####"),
        (MATHS, "It is $7$.", "boxed"),
    ],
)
def test_a_reference_without_answer_is_refused(judge: object, bad: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"row 5.*{remedy}"):
        judge.require_answer(bad, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("solution", "right", "wrong"),
    [
        (r"Half of it, $\boxed{\frac{1}{2}}$.", r"so $x = 0.5$", r"so $x = \frac{1}{3}$"),
        (r"First $\boxed{3}$, and then $\boxed{7}$.", r"The answer is $\boxed{7}$", r"The answer is $\boxed{3}$"),
        (r"\boxed{2}", r"First \boxed{3}. Wait, \boxed{2}.", r"First \boxed{2}. Wait, \boxed{3}."),
        (r"$\boxed{12\sqrt{2}}$", r"$\boxed{\sqrt{288}}$", r"$\boxed{12\sqrt{3}}$"),
        (r"$\boxed{(2, -3)}$", r"It is $(2,-3)$.", r"It is $(-3,2)$."),
        (r"\fbox{4}", "so 4", "so 5"),
        (r"$\boxed{x^2 + 2x + 1}$", r"$\boxed{(x+1)^2}$", r"$\boxed{(x-1)^2}$"),
        (r"$\boxed{[1, 5)}$", r"$[1,5)$", r"$(1,5)$"),
        (r"$\boxed{25\%}$", r"$\boxed{25}$ percent", r"$\boxed{26\%}$"),
        (r"$\boxed{\{1, 2, 3\}}$", r"$\{3, 2, 1\}$", r"$\{1, 2\}$"),
        (r"$\boxed{10{,}000}$", r"We get $\boxed{10000}$", r"We get $\boxed{1000}$"),
    ],
)
def test_maths_is_compared_by_value(solution: str, right: str, wrong: str) -> None:
    assert MATHS.is_right(right, solution)
    assert not MATHS.is_right(wrong, solution)
    assert not MATHS.is_right("", solution)


def test_judges_can_be_sent_to_other_ranks() -> None:
    for judge, answer in ((GSM8K, "#### 7"), (MATHS, r"$\boxed{7}$"), (judge_by_pattern(r"\d"), "7")):
        sent = pickle.loads(pickle.dumps(judge))
        assert sent.is_right("so 7", answer)
        assert not sent.is_right("so 8", answer)
        assert not sent.has_answer("none")
