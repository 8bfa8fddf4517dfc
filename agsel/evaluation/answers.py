"""Answers inside of texts, and whether a generated one is right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from agsel.errors import UserError

NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
"""As people write them, `1,000.50`, `.5` and `-$5` included."""
MARKED_NUMBER = rf"####\s*\$?({NUMBER})"
"""As GSM8K ends its solutions."""
BOXED = "\\boxed"
SECONDS_FOR_MATHS = 5
"""That an expression may take to be understood or compared; one that takes longer is no answer, or is not equal."""


@dataclass(frozen=True)
class Judge:
    """How the texts of a task are judged.

    Attributes:
        has_answer: whether a reference can be judged by.
        is_right: whether a generated text has the answer of a reference.
        remedy: what to do about a reference without an answer.
    """

    has_answer: Callable[[str], bool]
    is_right: Callable[[str, str], bool]
    remedy: str

    def require_answer(self, reference: str, number: int) -> None:
        """Refuse a reference, that of row `number`, that has no answer.

        Raises:
            UserError: names row and remedy.
        """
        if not self.has_answer(reference):
            raise UserError(f"no answer in the completion of row {number}: {self.remedy}")


def extract_answer(text: str, pattern: str) -> str | float | None:
    """The last match of `pattern`, or of the first of its groups that took part; a number if it reads as one.

    `1,000` and `$5` do. A match of nothing is no answer.
    """
    matches = list(re.finditer(pattern, text))
    return _value(matches[-1]) if matches else None


def gsm8k_answer(text: str) -> str | float | None:
    """The number after the first `####`, else the last number: a model may go on with a problem of its own."""
    marked = re.search(MARKED_NUMBER, text)
    return _value(marked) if marked else extract_answer(text, NUMBER)


def _value(match: re.Match[str]) -> str | float | None:
    found = (text.strip() for text in match.groups("") or (match.group(),))
    answer = next(filter(None, found), None)
    if answer is None:
        return None
    try:
        number = float(answer.replace(",", "").replace("$", ""))
    except ValueError:
        return answer
    return number if math.isfinite(number) else answer  # `nan` is a word, and two long numbers are not the same


def judge_by(read: Callable[[str], str | float | None], remedy: str) -> Judge:
    """Texts are right that say the same as the reference.

    Args:
        read: takes the answer out of a text; None if it has none.
        remedy: what to do about a reference without an answer.
    """
    return Judge(partial(_has, read), partial(_is_same, read), remedy)


def _has(read: Callable[[str], Any], reference: str) -> bool:
    return read(reference) is not None


def _is_same(read: Callable[[str], Any], generated: str, reference: str) -> bool:
    answer = read(reference)
    return answer is not None and read(generated) == answer


def judge_by_pattern(pattern: str) -> Judge:
    """Texts are right whose last match of a regular expression is that of the reference."""
    remedy = f"correct --answer_pattern {pattern!r}, or leave out the answers (--skip_generation)"
    return judge_by(partial(extract_answer, pattern=pattern), remedy)


def is_boxed(solution: str) -> bool:
    """Whether a solution marks its answer as those of MATH do."""
    return BOXED in _with_one_box(solution)


def equals_boxed(generated: str, solution: str) -> bool:
    """Whether the answer that a text boxes last, else its last one, is that of a solution, by `math-verify`."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # slow, and an extra of agsel

    boxes_first = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    gold, given = (
        parse(_from_last_box(text), boxes_first, parsing_timeout=SECONDS_FOR_MATHS) for text in (solution, generated)
    )
    return bool(verify(gold, given, timeout_seconds=SECONDS_FOR_MATHS))


def _from_last_box(text: str) -> str:
    """All of it, if there is none."""
    text = _with_one_box(text)
    return text[max(0, text.rfind(BOXED)) :]


def _with_one_box(text: str) -> str:
    r"""`\fbox` as `\boxed`: MATH has both."""
    return text.replace(r"\fbox", BOXED)


GSM8K = judge_by(gsm8k_answer, "GSM8K ends its answers with #### and a number")
MATHS = Judge(is_boxed, equals_boxed, "MATH has solutions with \\boxed{...}")
