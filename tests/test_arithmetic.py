"""tools/arithmetic.py: the demo's problems are right, disjoint and readable by its tokenizer; its model loads."""

import json
import re
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import agsel
from tests.distributed import REPOSITORY, environment
from tools import arithmetic

STEMS = ("one_step_train", "one_step_heldout", "two_step_train", "two_step_heldout")
GAINS = {"buys", "finds", "gets", "wins"}
LOSSES = {"drops", "loses", "sells", "spends"}

Rows = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic") / "demo"
    command = [sys.executable, "tools/arithmetic.py", "--output", str(folder)]
    subprocess.run(command, check=True, env=environment(), cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def rows(output: Path) -> Rows:
    return {stem: list(map(json.loads, (output / "data" / f"{stem}.jsonl").read_text().splitlines())) for stem in STEMS}


@pytest.fixture(scope="module")
def tokenizer(output: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(output / "base")


def numbers_asked(question: str) -> tuple[int, ...]:
    """Start and signed changes, read from the words of a story or from a bare sum."""
    words = re.findall(r"[a-z]+|\d+|[-+=]", question)
    signs = [1 if word in GAINS or word == "+" else -1 for word in words if word in {*GAINS, *LOSSES, "+", "-"}]
    start, *sizes = [int(word) for word in words if word.isdigit()]
    return (start, *(sign * size for sign, size in zip(signs, sizes, strict=True)))


@pytest.mark.parametrize(("stem", "steps"), [(stem, 1 if stem.startswith("one") else 2) for stem in STEMS])
def test_every_answer_is_right(rows: Rows, stem: str, steps: int) -> None:
    for row in rows[stem]:
        totals = list(accumulate(numbers_asked(row["question"])))
        assert len(totals) == steps + 1
        if row["question"].endswith("="):
            assert row["answer"] == str(totals[-1])
            continue
        for (before, after), text in zip(pairwise(totals), row["answer"].split(", "), strict=True):
            calculation, result = text.split(" = ")
            left, operator, right = calculation.split()
            assert (int(left), int(result)) == (before, after)
            assert {"+": before + int(right), "-": before - int(right)}[operator] == after


def test_numbers_stay_within_two_digits(rows: Rows) -> None:
    numbers = [int(digits) for part in rows.values() for row in part for digits in re.findall(r"\d+", str(row))]
    assert min(numbers) == 1
    assert max(numbers) == 99


@pytest.mark.parametrize("steps", ["one_step", "two_step"])
def test_no_held_out_numbers_occur_in_training(rows: Rows, steps: str) -> None:
    trained = {numbers_asked(row["question"]) for row in rows[f"{steps}_train"]}
    held_out = [numbers_asked(row["question"]) for row in rows[f"{steps}_heldout"]]
    assert trained.isdisjoint(held_out)
    assert len(set(held_out)) == len(held_out) >= 100


def test_one_step_training_is_half_stories_and_half_bare_sums(rows: Rows) -> None:
    bare = [row["question"].endswith("=") for row in rows["one_step_train"]]
    assert sum(bare) * 2 == len(bare)
    assert not any(row["question"].endswith("=") for stem in STEMS[1:] for row in rows[stem])


def test_writing_again_changes_nothing_and_another_seed_does(output: Path, tmp_path: Path) -> None:
    """The first time was in another process."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    dates = {path: path.stat().st_mtime_ns for path in files if path.suffix == ".jsonl"}
    for folder, seed in ((output, 0), (tmp_path, 1)):
        arithmetic.write_data(folder / "data", seed)
        arithmetic.write_model(folder / "base", seed)
    assert {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()} == contents
    assert {path: path.stat().st_mtime_ns for path in dates} == dates
    for path in [*dates, output / "base" / "model.safetensors"]:
        assert (tmp_path / path.relative_to(output)).read_bytes() != contents[path]


def test_tokenizer_gives_every_text_back_and_splits_numbers(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"{row['question']} {row['answer']}" for part in rows.values() for row in part]
    tokens = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(tokens) == texts
    for text, identifiers in zip(texts, tokens, strict=True):
        assert tokenizer.unk_token_id not in identifiers
        pieces = tokenizer.convert_ids_to_tokens(identifiers)
        assert [piece.strip() for piece in pieces if piece.strip().isdigit()] == re.findall(r"\d", text)


def test_vocabulary_is_what_the_problems_need(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"{row['question']} {row['answer']}{tokenizer.eos_token}" for part in rows.values() for row in part]
    used = {identifier for identifiers in tokenizer(texts)["input_ids"] for identifier in identifiers}
    unused = [tokenizer.pad_token, tokenizer.unk_token, " 0"]  # no number is 0
    assert set(range(len(tokenizer))) - used == set(tokenizer.convert_tokens_to_ids(unused))
    assert tokenizer("zebra!")["input_ids"] == [tokenizer.unk_token_id] * 2


def test_special_tokens_are_distinct_and_the_model_knows_them(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 3
    config = AutoModelForCausalLM.from_pretrained(output / "base").config
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_saved_model_is_the_one_built(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved = AutoModelForCausalLM.from_pretrained(output / "base")
    built = arithmetic.build_model(arithmetic.build_tokenizer(), seed=0)
    tokens = torch.tensor([tokenizer("Ada has 14 coins, then buys 8. How many now?")["input_ids"]])
    assert torch.equal(saved(tokens).logits, built(tokens).logits)
    layers = [block for block in agsel.find_blocks(saved) if block.is_layer]
    assert len(layers) == 6
