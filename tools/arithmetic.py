"""The demo's embedded parts: generated arithmetic word problems and a tiny untrained Llama that can read them.

    python tools/arithmetic.py --output runs/demo

writes `runs/demo/data/{one_step,two_step}_{train,heldout}.jsonl` (fields `question` and `answer`) and
`runs/demo/base/`, an ordinary Hugging Face folder with random weights. The same seed gives the same bytes.
"""

import argparse
import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("Ada", "Ben", "Eva", "Kim", "Leo", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "tickets")
VERBS = {"+": ("buys", "finds", "gets", "wins"), "-": ("drops", "loses", "sells", "spends")}
LARGEST_NUMBER = 99  # every number in a problem, results included, lies in 1 .. LARGEST_NUMBER
LARGEST_CHANGE = 9
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
PIECE = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]"  # a word, ONE digit or a sign, each with the space before it


@dataclass(frozen=True)
class Problem:
    """`start`, then one signed change per step; `name`, `thing` and `verbs` dress it in words."""

    start: int
    changes: tuple[int, ...]
    name: str
    thing: str
    verbs: tuple[str, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Problems with the same numbers are the same sum in other words."""
        return (self.start, *self.changes)

    def as_story(self) -> dict[str, str]:
        """`Tom has 14 apples, then buys 8, then sells 5. How many now?`: `14 + 8 = 22, 22 - 5 = 17`."""
        events = ", ".join(f"then {verb} {abs(change)}" for verb, change in zip(self.verbs, self.changes, strict=True))
        question = f"{self.name} has {self.start} {self.thing}, {events}. How many now?"
        totals = list(accumulate(self.numbers))
        steps = zip(totals[:-1], self.changes, totals[1:], strict=True)
        sums = [f"{before} {sign(change)} {abs(change)} = {after}" for before, change, after in steps]
        return {"question": question, "answer": ", ".join(sums)}

    def as_sum(self) -> dict[str, str]:
        """`14 + 8 =`: `22`, for a problem of one step."""
        question, answer = self.as_story()["answer"].rsplit(" ", 1)
        return {"question": question, "answer": answer}


def sign(change: int) -> str:
    """`+` for a gain, `-` for a loss."""
    return "+" if change > 0 else "-"


def draw_change(total: int, generator: random.Random) -> int:
    """A non-zero signed change of at most LARGEST_CHANGE that keeps `total` within 1 .. LARGEST_NUMBER."""
    room = {1: LARGEST_NUMBER - total, -1: total - 1}
    direction = generator.choice([direction for direction, limit in room.items() if limit > 0])
    return direction * generator.randint(1, min(LARGEST_CHANGE, room[direction]))


def draw_problem(steps: int, generator: random.Random) -> Problem:
    """One random problem with `steps` changes."""
    start = total = generator.randint(1, LARGEST_NUMBER)
    changes = []
    for _ in range(steps):
        changes.append(draw_change(total, generator))
        total += changes[-1]
    verbs = tuple(generator.choice(VERBS[sign(change)]) for change in changes)
    return Problem(start, tuple(changes), generator.choice(NAMES), generator.choice(THINGS), verbs)


def draw_split(steps: int, train_rows: int, heldout_rows: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems; the numbers of a held-out problem occur in no training problem."""
    generator = random.Random(f"{seed}/{steps}")
    heldout: dict[tuple[int, ...], Problem] = {}
    while len(heldout) < heldout_rows:
        problem = draw_problem(steps, generator)
        heldout.setdefault(problem.numbers, problem)
    train: list[Problem] = []
    while len(train) < train_rows:
        problem = draw_problem(steps, generator)
        if problem.numbers not in heldout:
            train.append(problem)
    return train, list(heldout.values())


def draw_data(seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows by file stem.

    Half of the one-step training rows are bare sums: a model that has only read sums inside stories works them out
    from the words, and cannot do the second sum of a two-step problem, whose first number stands in no story.
    """
    one_train, one_heldout = draw_split(1, 8192, 128, seed)
    two_train, two_heldout = draw_split(2, 4096, 256, seed)
    return {
        "one_step_train": [row.as_sum() if number % 2 else row.as_story() for number, row in enumerate(one_train)],
        "one_step_heldout": [row.as_story() for row in one_heldout],
        "two_step_train": [row.as_story() for row in two_train],
        "two_step_heldout": [row.as_story() for row in two_heldout],
    }


def write_data(folder: Path, seed: int) -> None:
    """Write the four JSONL files. One that is right already keeps its date: caches of datasets depend on it."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in draw_data(seed).items():
        path, text = folder / f"{stem}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def vocabulary() -> list[str]:
    """Every piece a problem can hold, after the special tokens. Names open the text: no space before them."""
    verbs = [verb for verbs in VERBS.values() for verb in verbs]
    digits = [str(digit) for digit in range(10)]
    spaced = [f" {piece}" for piece in (*THINGS, *verbs, "has", "then", "How", "many", "now", *digits, "+", "-", "=")]
    return [*SPECIAL_TOKENS.values(), *NAMES, *digits, ",", ".", "?", *spaced]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, numbers split into digits; decoding gives the text back exactly."""
    identifiers = {piece: identifier for identifier, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(identifiers, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama with few weights (0.3 M, fp32) and many blocks: six narrow layers.

    Layers this narrow need weights larger than the usual 0.02 to start with: they learn twice as fast.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def write_model(folder: Path, seed: int) -> None:
    """Save the untrained model with its tokenizer as an ordinary Hugging Face folder."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write data and model below `--output`."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that receives data/ and base/")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the weights")
    arguments = parser.parse_args()
    write_data(arguments.output / "data", arguments.seed)
    write_model(arguments.output / "base", arguments.seed)


if __name__ == "__main__":
    main()
