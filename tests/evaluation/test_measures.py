"""Likelihoods and greedy texts against TRL's own tokenisation, and against loops without batches, padding or caches."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from agsel.errors import UserError
from agsel.evaluation.answers import GSM8K
from agsel.evaluation.batches import form_batches
from agsel.evaluation.findings import summarise_text
from agsel.evaluation.limits import require_embedded, window_of
from agsel.evaluation.loading import load_model
from agsel.evaluation.measures import generate, in_parts, token_losses
from agsel.evaluation.questions import Example, Question, encode_example
from agsel.evaluation.work import Part
from tests.evaluation.loops import loop_of_losses, loop_of_texts
from tools import arithmetic

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """Prompts and completions of three lengths."""
    data = arithmetic.draw_data(seed=3)
    mixed = data["one_step_train"][:10] + data["two_step_heldout"][:7]
    return [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in mixed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, as a folder."""
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    arithmetic.write_model(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(str(folder), "auto")


@pytest.fixture(scope="module")
def examples(rows: list[dict[str, str]], loaded: tuple) -> list[Example]:
    return [encode_example(row["prompt"], row["completion"], loaded[1]) for row in rows]


def test_tokens_and_labels_are_those_that_trl_trains_on(
    rows: list[dict[str, str]], loaded: tuple, examples: list[Example], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    settings = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for prepared, example in zip(trainer.train_dataset, examples, strict=True):
        assert prepared["input_ids"] == example.sequence
        counted = zip(example.sequence, example.counted, strict=True)
        assert prepared["labels"] == [token if counts else -100 for token, counts in counted]
        assert example.counted[-1]
        assert example.sequence[-1] == tokenizer.eos_token_id


def test_end_of_sequence_is_added_once(loaded: tuple) -> None:
    tokenizer = loaded[1]
    assert encode_example("3 + 4 =", " 7", tokenizer) == encode_example(
        "3 + 4 =", f" 7{tokenizer.eos_token}", tokenizer
    )


def test_completion_starts_where_the_texts_part(loaded: tuple) -> None:
    """`has 1` and `has 14 coins` share tokens that a cut after the prompt's characters would miss."""
    tokenizer = loaded[1]
    example = encode_example("Ada has 14 coi", "ns", tokenizer)
    start = example.counted.index(True)
    assert tokenizer.decode(example.sequence[:start]) == "Ada has 14"
    assert tokenizer.decode(example.sequence[start:]) == f" coins{tokenizer.eos_token}"


@pytest.mark.parametrize("batch_size", [1, 4, 17, 64])
@torch.inference_mode()
def test_losses_equal_a_loop_over_tokens_whatever_the_batch(
    loaded: tuple, examples: list[Example], batch_size: int
) -> None:
    for rows in form_batches([len(example.sequence) for example in examples], batch_size, 10_000):
        chosen = [examples[row] for row in rows]
        for losses, example in zip(token_losses(loaded[0], chosen), chosen, strict=True):
            expected = loop_of_losses(loaded[0], example)
            assert len(losses) == len(expected)
            assert all(math.isclose(*pair, rel_tol=1e-5) for pair in zip(losses.tolist(), expected, strict=True))


@torch.inference_mode()
def test_the_first_token_of_all_does_not_count(loaded: tuple) -> None:
    (losses,) = token_losses(loaded[0], [Example([], [5, 6, 7], [True, True, True])])
    assert len(losses) == 2, "nothing predicts it"


@torch.inference_mode()
def test_only_counted_tokens_count(loaded: tuple, examples: list[Example]) -> None:
    example = examples[0]
    whole = example._replace(counted=[True] * len(example.sequence))
    gaps = example._replace(counted=[place % 3 == 1 for place in range(len(example.sequence))])
    (all_losses,), (some,) = token_losses(loaded[0], [whole]), token_losses(loaded[0], [gaps])
    assert torch.equal(some, all_losses[[place - 1 for place in range(1, len(example.sequence), 3)]])


@pytest.mark.parametrize("batch_size", [1, 5, 17])
@torch.inference_mode()
def test_texts_equal_a_loop_over_tokens_whatever_the_batch(
    loaded: tuple, examples: list[Example], batch_size: int
) -> None:
    model, tokenizer = loaded
    prompts = [example.prompt for example in examples]
    texts = [""] * len(prompts)
    for rows in form_batches(list(map(len, prompts)), batch_size, 10_000):
        for row, text in zip(rows, generate(model, tokenizer, [prompts[row] for row in rows], NEW_TOKENS), strict=True):
            texts[row] = text
    assert texts == [loop_of_texts(model, tokenizer, prompt, NEW_TOKENS) for prompt in prompts]
    assert len(set(texts)) > len(texts) // 2, "an untrained model that always says the same cannot show a mix-up"


@torch.inference_mode()
def test_texts_end_at_the_end_of_sequence(loaded: tuple, examples: list[Example]) -> None:
    """Whatever the model says third is made the end of sequence."""
    model, tokenizer = loaded
    prompts = [examples[0].prompt]
    (until_third,), (further,) = (generate(model, tokenizer, prompts, tokens) for tokens in (3, NEW_TOKENS))
    assert len(further) > len(until_third)
    third = int(model.generate(torch.tensor(prompts), max_new_tokens=3, do_sample=False)[0, -1])
    tokenizer.eos_token, before = tokenizer.convert_ids_to_tokens(third), tokenizer.eos_token
    try:
        assert generate(model, tokenizer, prompts, NEW_TOKENS) == [until_third]
    finally:
        tokenizer.eos_token = before


@torch.inference_mode()
def test_texts_end_before_a_text_that_stops_them(
    loaded: tuple, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row by itself; a batch of which every row has stopped generates no more."""
    model, tokenizer = loaded
    prompts = [example.prompt for example in examples[:4]]
    whole = generate(model, tokenizer, prompts, NEW_TOKENS)
    stop = whole[0].split()[2]
    expected = [text[: text.find(stop)] if stop in text else text for text in whole]
    assert generate(model, tokenizer, prompts, NEW_TOKENS, [stop, "never said"]) == expected
    forwards = 0
    forward = model.forward

    def counting(*arguments: object, **options: object) -> object:
        nonlocal forwards
        forwards += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", counting)
    generate(model, tokenizer, prompts[:1], NEW_TOKENS, [stop])
    assert forwards < NEW_TOKENS


@torch.inference_mode()
def test_texts_are_greedy_whatever_generation_settings_the_model_has(loaded: tuple, examples: list[Example]) -> None:
    """transformers fills up settings that are left open with the model's; these stay as they are, to be saved."""
    model, tokenizer = loaded
    prompts = [example.prompt for example in examples[:4]]
    greedy = generate(model, tokenizer, prompts, NEW_TOKENS)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, num_beams=3, repetition_penalty=2.0, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7, 8]
    )
    try:
        assert generate(model, tokenizer, prompts, NEW_TOKENS) == greedy
        assert model.generation_config.repetition_penalty == 2.0
    finally:
        model.generation_config = before


def model_with_positions(positions: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=positions, n_embd=8, n_layer=1, n_head=1))


@torch.inference_mode()
def test_rows_beyond_the_embeddings_of_a_model_are_refused_and_texts_cut_to_them() -> None:
    model = model_with_positions(16)
    row = Example([3] * 9, [3] * 16, [False] * 9 + [True] * 7)
    asked = [Question(7, "", "", row)]
    require_embedded(model, [Part("rows", [row], asked), Part("rows", [row], asked, GSM8K, max_new_tokens=7)])
    with pytest.raises(UserError, match=r"row 7 of rows needs 17 positions, of which 8 .*--max_new_tokens"):
        require_embedded(model, [Part("rows", [row], asked, GSM8K, max_new_tokens=8)])
    longer = row._replace(sequence=[3] * 17)
    with pytest.raises(UserError, match="row 7 of rows needs 17 positions"):
        require_embedded(model, [Part("rows", [longer], asked)])
    with pytest.raises(UserError, match="row 7 of rows has the token 50 of the tokenizer"):
        require_embedded(model, [Part("rows", [row._replace(prompt=[50])], asked)])
    window = window_of(model)
    token_losses(model, [Example([], [3] * (window + 1), [False] + [True] * window)])
    assert (window, window_of(model_with_positions(2048))) == (15, 1024)


def test_the_perplexity_of_a_model_that_has_diverged_is_a_number() -> None:
    assert summarise_text([{"loss": 2000.0, "completion_tokens": 2}])["perplexity"] == math.inf
    assert math.isnan(summarise_text([{"loss": math.nan, "completion_tokens": 2}])["perplexity"])


def test_work_that_does_not_fit_is_done_in_halves() -> None:
    """Any order of failures: more than three at once do not fit."""
    sizes = []

    def work(items: list[int]) -> list[int]:
        if len(items) > 3:
            raise torch.OutOfMemoryError("too many")
        sizes.append(len(items))
        return [item * item for item in items]

    assert in_parts(work, list(range(11))) == [item * item for item in range(11)]
    assert max(sizes) <= 3


def test_a_row_that_does_not_fit_alone_is_refused() -> None:
    def work(items: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("never")

    with pytest.raises(RuntimeError, match="--max_new_tokens"):
        in_parts(work, [1, 2])


@pytest.mark.parametrize(
    ("lengths", "rows", "tokens", "expected"),
    [
        ([3, 9, 5, 5], 2, 100, [[1, 2], [3, 0]]),
        ([3, 9, 5, 5], 4, 10, [[1], [2, 3], [0]]),
        ([3, 20], 4, 10, [[1], [0]]),
        ([], 4, 10, []),
    ],
)
def test_batches_are_the_longest_first_and_within_rows_and_tokens(
    lengths: list[int], rows: int, tokens: int, expected: list[list[int]]
) -> None:
    assert list(form_batches(lengths, rows, tokens)) == expected
