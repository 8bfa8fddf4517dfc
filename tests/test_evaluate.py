"""launch/evaluate.py against TRL's own tokenisation and against loops without batches, padding or caches."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from agsel import evaluate
from agsel.data.fields import Fields
from agsel.evaluate import EvaluationArguments, Example, answer_loss, encode, extract_answer, generate, judge
from tests.distributed import REPOSITORY, environment
from tools import arithmetic

NEW_TOKENS = 12
DATA = Fields(prompt_field="question", completion_field="answer", completion_template=" {answer}")


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
    return evaluate.load_model(EvaluationArguments(model=str(folder), dataset_name="unused"))


@pytest.fixture(scope="module")
def examples(rows: list[dict[str, str]], loaded: tuple) -> list[Example]:
    return [encode(row["prompt"], row["completion"], loaded[1]) for row in rows]


def test_tokens_and_labels_are_those_that_trl_trains_on(
    rows: list[dict[str, str]], loaded: tuple, examples: list[Example], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    settings = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for prepared, example in zip(trainer.train_dataset, examples, strict=True):
        assert prepared["input_ids"] == example.sequence
        assert prepared["labels"] == [-100] * example.start + example.sequence[example.start :]
        assert example.sequence[example.start :][-1] == tokenizer.eos_token_id


def test_end_of_sequence_is_added_once(loaded: tuple) -> None:
    tokenizer = loaded[1]
    assert encode("3 + 4 =", " 7", tokenizer) == encode("3 + 4 =", f" 7{tokenizer.eos_token}", tokenizer)


def test_completion_starts_where_the_texts_part(loaded: tuple) -> None:
    """`has 1` and `has 14 coins` share tokens that a cut after the prompt's characters would miss."""
    tokenizer = loaded[1]
    example = encode("Ada has 14 coi", "ns", tokenizer)
    assert tokenizer.decode(example.sequence[: example.start]) == "Ada has 14"
    assert tokenizer.decode(example.sequence[example.start :]) == f" coins{tokenizer.eos_token}"


@torch.inference_mode()
def naive_loss(model: PreTrainedModel, examples: list[Example]) -> tuple[float, int]:
    """One row at a time, one token at a time, from the definition."""
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.sequence])).logits[0].double()
        for position in range(example.start, len(example.sequence)):
            distribution = torch.log_softmax(logits[position - 1], dim=0)
            total -= distribution[example.sequence[position]].item()
            count += 1
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 4, 17, 64])
@torch.inference_mode()
def test_loss_equals_a_loop_over_rows_whatever_the_batch_size(
    loaded: tuple, examples: list[Example], batch_size: int
) -> None:
    loss, tokens = answer_loss(loaded[0], examples, batch_size)
    expected, count = naive_loss(loaded[0], examples)
    assert tokens == count
    assert math.isclose(loss, expected, rel_tol=1e-6)


@torch.inference_mode()
def naive_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """The whole text read again for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NEW_TOKENS:
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 5, 17])
@torch.inference_mode()
def test_generation_equals_a_loop_over_tokens_whatever_the_batch_size(
    loaded: tuple, examples: list[Example], batch_size: int
) -> None:
    model, tokenizer = loaded
    texts = generate(model, tokenizer, examples, batch_size, NEW_TOKENS)
    assert texts == [naive_generation(model, tokenizer, example.prompt) for example in examples]
    assert len(set(texts)) > len(texts) // 2, "an untrained model that always says the same cannot show a mix-up"


@torch.inference_mode()
def test_generation_ends_at_the_end_of_sequence(loaded: tuple, examples: list[Example]) -> None:
    """Whatever the model says third is made the end of sequence."""
    model, tokenizer = loaded
    until_third, further = (generate(model, tokenizer, examples[:1], 1, tokens)[0] for tokens in (3, NEW_TOKENS))
    assert len(further) > len(until_third)
    third = int(model.generate(torch.tensor([examples[0].prompt]), max_new_tokens=3, do_sample=False)[0, -1])
    tokenizer.eos_token, before = tokenizer.convert_ids_to_tokens(third), tokenizer.eos_token
    try:
        assert generate(model, tokenizer, examples[:1], 1, NEW_TOKENS)[0] == until_third
    finally:
        tokenizer.eos_token = before


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("He earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10", None, 10),
        ("#### 1,250", None, 1250),
        ("#### -3.50", None, -3.5),
        ("14 + 8 = 22, 22 - 5 = 17", None, 17),
        ("It costs $18.", None, 18),
        ("none", None, None),
        ("#### 12\nQuestion: 99", r"#### (\S+)", 12),
        ("The answer is (B) not (C)", r"\(([A-D])\)", "C"),
        ("#### 5 #### ", r"####(?: (\d+))?", ""),
    ],
)
def test_answer_is_the_last_match(text: str, pattern: str | None, answer: float | str | None) -> None:
    default = EvaluationArguments(model="", dataset_name="").answer_pattern
    assert extract_answer(text, pattern or default) == answer


def test_judgement_compares_the_last_numbers() -> None:
    rows = [{"prompt": "a", "completion": " 1 + 2 = 3"}, {"prompt": "b", "completion": " #### 1,000"}]
    verdicts = judge(rows * 2, [" so 3", " 1000.0", " 3 or 4", ""], r"-?\d[\d,]*(?:\.\d+)?")
    assert [verdict["correct"] for verdict in verdicts] == [True, True, False, False]


def test_no_answer_in_the_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1.*--answer_pattern"):
        judge([{"prompt": "", "completion": "7"}, {"prompt": "", "completion": "seven"}], ["7", "7"], r"\d")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "--batch_size"),
        ({"limit": 0}, "--limit"),
        ({"dtype": "fp32"}, "--dtype"),
        ({"answer_pattern": "("}, r"'\(' is no regular expression \(--answer_pattern\)"),
    ],
)
def test_bad_settings_are_named(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EvaluationArguments(model="", dataset_name="", **settings)


def test_messages_are_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    for number, row in enumerate([{"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="--prompt_field"):
            evaluate.load_prompts(EvaluationArguments(model="", dataset_name=str(path)), Fields())


def run_evaluation(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)


def test_command_prints_and_writes_what_the_functions_find(folder: Path, tmp_path: Path) -> None:
    """One row is given the very number that the model generates, so that right and wrong both occur."""
    path, written = tmp_path / "rows.jsonl", tmp_path / "new" / "folder" / "results.json"
    data = arithmetic.draw_data(seed=9)["two_step_heldout"][:6]
    model, tokenizer = evaluate.load_model(EvaluationArguments(model=str(folder), dataset_name=""))
    texts = [naive_generation(model, tokenizer, tokenizer(row["question"])["input_ids"]) for row in data]
    said = next(number for number, text in enumerate(texts[:5]) if re.search(r"\d", text))
    data[said]["answer"] = re.findall(r"\d+", texts[said])[-1]
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    columns = ("--prompt_field", "question", "--completion_field", "answer", "--completion_template", " {answer}")
    result = run_evaluation(
        "--model",
        folder,
        "--dataset",
        path,
        *columns,
        "--limit",
        5,
        "--max_new_tokens",
        NEW_TOKENS,
        "--output",
        written,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(written.read_text())
    expected, count = naive_loss(model, [encode(row["question"], f" {row['answer']}", tokenizer) for row in data[:5]])
    assert math.isclose(report["nll"], expected, rel_tol=1e-6)
    assert (report["rows"], report["completion_tokens"]) == (5, count)
    assert [prediction["generated"] for prediction in report["predictions"]] == texts[:5]
    assert report["predictions"][said]["correct"]
    assert report["accuracy"] == sum(prediction["correct"] for prediction in report["predictions"]) / 5
    assert f"{report['nll']:.4f}" in result.stdout
    assert f"{report['accuracy']:.4f}" in result.stdout


def test_command_names_a_misspelt_field_in_one_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "3 + 4 =", "answer": "7"}\n')
    result = run_evaluation(
        "--model", folder, "--dataset", path, "--prompt_field", "qestion", "--completion_field", "answer"
    )
    assert result.returncode == 1
    assert re.search(r"^agsel: error: .*--prompt_field.*'question'", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_the_folder_of_a_run_is_refused_by_the_name_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(ValueError, match=rf"name its model, {tmp_path / 'model'}"):
        evaluate.load_model(EvaluationArguments(model=str(tmp_path), dataset_name="rows.jsonl"))


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "results.json"):
        with pytest.raises(ValueError, match="--output"):
            evaluate.prepare_output(path)
