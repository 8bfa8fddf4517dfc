"""launch/evaluate.py as a command: on 1, 2 and 3 ranks, killed, with adapters, and beside lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from agsel.evaluation.answers import NUMBER
from agsel.evaluation.loading import load_model
from agsel.evaluation.measures import generate, token_losses
from agsel.evaluation.questions import encode_example
from tests.distributed import REPOSITORY, environment, launch, run_ranks
from tests.evaluation.loops import loop_of_losses, loop_of_texts
from tools import arithmetic

NEW_TOKENS = 12
ROWS = 21
COLUMNS = ("--prompt_field", "question", "--completion_field", "answer", "--completion_template", " {answer}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, as a folder."""
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    arithmetic.write_model(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def rows(model: Path) -> Path:
    """Every third one is given the very number that the model generates, so that right and wrong both occur."""
    loaded, tokenizer = load_model(str(model), "auto")
    data = arithmetic.draw_data(seed=9)["two_step_heldout"][:ROWS]
    for row in data[::3]:
        text = loop_of_texts(loaded, tokenizer, tokenizer(row["question"])["input_ids"], NEW_TOKENS)
        row["answer"] = (re.findall(r"\d+", text) or [row["answer"]])[-1]
    path = model.parent / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "text.txt"
    path.write_text(" ".join(row["question"] for row in arithmetic.draw_data(seed=2)["one_step_train"][:400]))
    return path


def arguments(model: Path, rows: Path, output: Path, **changed: object) -> list[str]:
    chosen = {"model": model, "dataset": rows, "output": output, "max_new_tokens": NEW_TOKENS, "batch_size": 8}
    pairs = [(f"--{name}", str(value)) for name, value in (chosen | changed).items() if value is not None]
    return [*(word for pair in pairs for word in pair), *COLUMNS]


def alone(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/evaluate.py", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def by_one(model: Path, rows: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one process."""
    output = tmp_path_factory.mktemp("one") / "new" / "folder" / "results.json"
    result = alone(*arguments(model, rows, output, perplexity=text))
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert f"{found['nll']:.4f}" in result.stdout
    assert f"{found['accuracy']:.4f}" in result.stdout
    return output


def test_it_writes_what_loops_over_rows_and_tokens_find(by_one: Path, model: Path, rows: Path, text: Path) -> None:
    loaded, tokenizer = load_model(str(model), "auto")
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    losses = [loop_of_losses(loaded, encode_example(row["question"], f" {row['answer']}", tokenizer)) for row in data]
    texts = [loop_of_texts(loaded, tokenizer, tokenizer(row["question"])["input_ids"], NEW_TOKENS) for row in data]
    found = json.loads(by_one.read_text())
    lines = [json.loads(line) for line in by_one.with_suffix(".jsonl").read_text().splitlines()]
    assert (found["rows"], found["completion_tokens"]) == (ROWS, sum(map(len, losses)))
    assert math.isclose(found["nll"], math.fsum(map(math.fsum, losses)) / sum(map(len, losses)), rel_tol=1e-6)
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert [line["generated"] for line in lines] == texts
    for line, row_losses in zip(lines, losses, strict=True):
        assert math.isclose(line["nll"], math.fsum(row_losses) / len(row_losses), rel_tol=1e-5)
        numbers = (re.findall(r"-?\d+", side) for side in (line["generated"], line["completion"]))
        last = [float(found[-1]) if found else None for found in numbers]
        assert line["correct"] == (last[0] == last[1])
    assert found["correct"] == sum(line["correct"] for line in lines)
    assert found["accuracy"] == found["correct"] / ROWS
    assert 0 < found["correct"] < ROWS
    tokens = len(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    assert found["text_tokens"] == tokens - 1 > 1024, "several windows"
    assert math.isclose(found["perplexity"], math.exp(found["text_nll"]))


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_finds_the_same(
    by_one: Path, model: Path, rows: Path, text: Path, tmp_path: Path, ranks: int
) -> None:
    output = tmp_path / "results.json"
    result = launch("launch/evaluate.py", *arguments(model, rows, output, perplexity=text), ranks=ranks)
    assert result.returncode == 0, result.stdout
    assert output.read_text() == by_one.read_text()
    assert output.with_suffix(".jsonl").read_text() == by_one.with_suffix(".jsonl").read_text()
    assert len(re.findall(r"^rows +21$", result.stdout, re.MULTILINE)) == 1, "one rank speaks"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.jsonl"}


def test_a_killed_evaluation_goes_on(by_one: Path, model: Path, rows: Path, text: Path, tmp_path: Path) -> None:
    """Killed on one rank with some of the batches done, it goes on where it was, on two, and finds the same."""
    output = tmp_path / "results.json"
    words = arguments(model, rows, output, perplexity=text)
    command = [sys.executable, "launch/evaluate.py", *words]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL)
    kept = output.with_suffix(".parts") / "rank-0.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None and not (kept.is_file() and kept.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = kept.read_text().count("\n")
    assert done >= 1
    assert not output.exists(), "it had ended before it was killed"
    said = re.search(r"goes on   (\d+) of (\d+) batches", run_ranks("launch/evaluate.py", *words))
    assert said is not None
    assert done <= int(said[1]) < int(said[2])
    assert output.read_text() == by_one.read_text()
    assert output.with_suffix(".jsonl").read_text() == by_one.with_suffix(".jsonl").read_text()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_judged_as_the_model_it_is_merged_into(
    model: Path, rows: Path, tmp_path: Path, use_dora: bool
) -> None:
    """Its folder has no tokenizer: that of the base is taken."""
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=use_dora)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "merged")
    losses, texts = {}, {}
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    for name, folder in {"adapter": tmp_path / "adapter", "merged": tmp_path / "merged", "base": model}.items():
        loaded, tokenizer = load_model(str(folder), "auto")
        examples = [encode_example(row["question"], f" {row['answer']}", tokenizer) for row in data]
        with torch.no_grad():
            losses[name] = torch.cat(token_losses(loaded, examples))
            texts[name] = generate(loaded, tokenizer, [example.prompt for example in examples], NEW_TOKENS)
    torch.testing.assert_close(losses["adapter"], losses["merged"], rtol=1e-4, atol=1e-5)
    assert texts["adapter"] == texts["merged"] != texts["base"]


def test_the_harness_gives_the_same_verdicts(model: Path, tmp_path: Path) -> None:
    """200 problems, some answered right; a task that expects something else gives another verdict on just those."""
    loaded, tokenizer = load_model(str(model), "auto")
    problems = [{"question": row["question"]} for row in arithmetic.draw_data(seed=1)["two_step_heldout"][:200]]
    for number, row in enumerate(problems):
        prompt = f"Question: {row['question']}\nAnswer:"
        said = "" if number % 9 else loop_of_texts(loaded, tokenizer, tokenizer(prompt)["input_ids"], NEW_TOKENS)
        row["answer"] = f"as it is\n#### {(re.findall(NUMBER, said) or ['1,234'])[-1]}"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in problems))
    task = (REPOSITORY / "launch" / "lm_eval" / "gsm8k.yaml").read_text()
    task = task.replace("data/gsm8k/test.jsonl", str(rows)).replace("max_gen_toks: 256", f"max_gen_toks: {NEW_TOKENS}")
    (tmp_path / "same.yaml").write_text(task)
    other = re.sub(r"doc_to_target: .*", 'doc_to_target: "x"', task.replace("task: gsm8k_local", "task: other"))
    (tmp_path / "other.yaml").write_text(other)
    harness = f"{tmp_path / 'same.yaml'},{tmp_path / 'other.yaml'}"
    words = ["--model", model, "--tasks", "gsm8k", "--dataset", rows, "--max_new_tokens", NEW_TOKENS]
    run_ranks("launch/evaluate.py", *words, "--lm_eval", harness, "--output", tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    same, others = found["lm_eval"]["gsm8k_local"], found["lm_eval"]["other"]
    assert (same["compared"], same["differences"]) == (200, [])
    assert same["exact_match,number"] == found["accuracy"] > 0
    assert others["compared"] == 200
    assert len(others["differences"]) == found["correct"]
    assert all(difference["agsel"] and not difference["lm_eval"] for difference in others["differences"])


@pytest.mark.slow
def test_the_harness_takes_fewer_rows_than_ranks_and_compares_likelihoods(model: Path, tmp_path: Path) -> None:
    rows = [{"asked": "1 + 1 =", "choices": [" 2", " 3"], "right": right} for right in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: choices\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{asked}}'\ndoc_to_choice: choices\n"
        "doc_to_target: right\nmetric_list: [{metric: acc}]\n"
    )
    words = ["--model", model, "--lm_eval", tmp_path / "task.yaml", "--output", tmp_path / "results.json"]
    result = launch("launch/evaluate.py", *words, ranks=3)
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "results.json").read_text())["lm_eval"]["choices"]
    assert (found["sample_len"], found["acc,none"]) == (2, 0.5), "one of two equal questions"


def test_a_mistake_is_named_in_one_line(model: Path, rows: Path, tmp_path: Path) -> None:
    words = ["--model", str(model), "--dataset", str(rows), "--prompt_field", "qestion", "--completion_field", "answer"]
    result = alone(*words, "--output", str(tmp_path / "results.json"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = re.findall(r"^agsel: error: (.*)$", result.stderr, re.MULTILINE)
    assert re.search(r"--prompt_field.*'question'", line)
