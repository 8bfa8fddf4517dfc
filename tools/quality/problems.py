"""Generated arithmetic of two steps, in the form of GSM8K: a task in which a small model can become good.

    python tools/quality/problems.py --output data/arithmetic
    python tools/quality/problems.py --output data/hard --digits 3 --operations add subtract multiply divide

writes `train.jsonl`, `validation.jsonl` and `test.jsonl`, each row a `question` and an `answer`: both steps written
out, a line each, then `#### ` and the result. No two rows of all three files are the same sum, in whatever words. The
same settings give the same bytes. It needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STEPS = 2
SMALL = range(2, 10)
"""Factors and divisors."""
MOST_DIGITS = 9
VAIN_DRAWS = 100
"""In a row, after which hardly any sum is left that is not in the files yet."""

NAMES = ("Ada", "Ben", "Eva", "Kim", "Leo", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "tickets")
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
EVENTS = {
    "add": ("buys {number} more", "finds {number} more", "wins {number} more"),
    "subtract": ("gives away {number}", "loses {number}", "sells {number}"),
    "multiply": ("collects until there are {number} times as many", "makes it {number} times as many"),
    "divide": (
        "shares them among {number} people and keeps one share",
        "keeps only one of {number} equal piles",
    ),
}


class Step(NamedTuple):
    """One operation with its second number."""

    operation: str
    number: int

    def applied(self, total: int) -> int:
        """What there is after it."""
        results = {"add": total + self.number, "subtract": total - self.number, "multiply": total * self.number}
        return results.get(self.operation, total // self.number)


class Problem(NamedTuple):
    """A number of things, and what happens to it."""

    start: int
    steps: tuple[Step, ...]


class TooFewError(ValueError):
    """There are not as many different problems as were asked for."""


def draw_step(total: int, digits: int, operations: Sequence[str], generator: random.Random) -> Step:
    """One step after which at least one thing is left. A number of which nothing can be taken is added to."""
    divisors = [number for number in SMALL if total % number == 0]
    possible = {"add": True, "subtract": total > 1, "multiply": True, "divide": bool(divisors)}
    operation = generator.choice([operation for operation in operations if possible[operation]] or ["add"])
    if operation == "multiply":
        return Step(operation, generator.choice(SMALL))
    if operation == "divide":
        return Step(operation, generator.choice(divisors))
    largest = 10**digits - 1
    return Step(operation, generator.randint(1, largest if operation == "add" else min(largest, total - 1)))


def draw_problem(digits: int, operations: Sequence[str], generator: random.Random) -> Problem:
    """A random problem whose first number has `digits` digits, and what is added or taken away at most as many."""
    start = total = generator.randint(10 ** (digits - 1), 10**digits - 1)
    steps = []
    for _ in range(STEPS):
        steps.append(draw_step(total, digits, operations, generator))
        total = steps[-1].applied(total)
    return Problem(start, tuple(steps))


def draw_problems(count: int, digits: int, operations: Sequence[str], generator: random.Random) -> list[Problem]:
    """Different problems.

    Raises:
        TooFewError: there are hardly so many.
    """
    found: dict[Problem, None] = {}
    vain = 0
    while len(found) < count:
        before = len(found)
        found.setdefault(draw_problem(digits, operations, generator))
        vain = 0 if len(found) > before else vain + 1
        if vain > VAIN_DRAWS:
            raise TooFewError(
                f"there are hardly more than {before:,} different problems of this kind, and the files are to have "
                f"{count:,}: raise --digits, or lower --train_rows"
            )
    return list(found)


def as_row(problem: Problem, generator: random.Random) -> dict[str, str]:
    """`question` and `answer`, dressed in random words."""
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    events, lines, total = [], [], problem.start
    for step in problem.steps:
        after = step.applied(total)
        events.append(generator.choice(EVENTS[step.operation]).format(number=step.number))
        lines.append(f"{name} has {total} {SIGNS[step.operation]} {step.number} = {after} {thing}.")
        total = after
    story = f"{name} has {problem.start} {thing}. First {name} {', then '.join(events)}."
    question = f"{story} How many {thing} does {name} have now?"
    return {"question": question, "answer": "\n".join([*lines, f"#### {total}"])}


def draw_files(
    rows: dict[str, int], digits: int, operations: Sequence[str], seed: int
) -> dict[str, list[dict[str, str]]]:
    """Rows by file stem. Those judged are drawn first: another number of training rows leaves them as they are.

    Raises:
        TooFewError: there are hardly so many different problems.
    """
    generator = random.Random(f"{seed}/{digits}/{' '.join(operations)}")
    problems = iter(draw_problems(sum(rows.values()), digits, operations, generator))
    words = {stem: random.Random(f"{seed}/{stem}") for stem in rows}
    judged_first = sorted(rows, key=lambda stem: stem == "train")
    return {stem: [as_row(next(problems), words[stem]) for _ in range(rows[stem])] for stem in judged_first}


def write_files(folder: Path, files: dict[str, list[dict[str, str]]]) -> None:
    """One JSONL file for each. One that is right already keeps its date: caches of datasets depend on it."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in files.items():
        path, text = folder / f"{stem}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: write a whole number from 1 on")
    return number


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    options = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--output", type=Path, required=True, help="folder that receives the three files")
    options.add_argument(
        "--digits", type=int, choices=range(1, MOST_DIGITS + 1), default=3, help="of the first number (default 3)"
    )
    options.add_argument(
        "--operations", nargs="+", choices=SIGNS, default=["add", "subtract", "multiply"], help="a step is one of them"
    )
    options.add_argument("--train_rows", type=count, default=6000)
    options.add_argument("--validation_rows", type=count, default=500)
    options.add_argument("--test_rows", type=count, default=1000)
    options.add_argument("--seed", type=int, default=0)
    return options


def main() -> None:
    """Write the files."""
    options = parser().parse_args()
    rows = {stem: getattr(options, f"{stem}_rows") for stem in ("train", "validation", "test")}
    operations = [operation for operation in SIGNS if operation in options.operations]
    try:
        write_files(options.output, draw_files(rows, options.digits, operations, options.seed))
    except (TooFewError, OSError) as error:
        sys.exit(f"agsel: error: {error}")


if __name__ == "__main__":
    main()
