"""Tasks as the user names them, and their rows as questions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from agsel.data.fields import Fields
from agsel.data.sources import Source
from agsel.errors import UserError
from agsel.evaluation.answers import judge_by_pattern
from agsel.evaluation.questions import Question, read_questions, read_text
from agsel.evaluation.tasks import TASKS, Task, read_tasks
from tests.data.tokenizers import of_bytes, with_added
from tests.tiny_run import save_model

PROBLEMS = [{"question": f"{n} plus w1?", "answer": f"w2 #### {n}"} for n in range(6)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("model"), layers=1))


def questions(task: Task, tokenizer: PreTrainedTokenizerBase, **changed: object) -> list[Question]:
    return read_questions(task, tokenizer, **{"n_shot": 0, "limit": None, "generates": True} | changed)  # type: ignore[arg-type]


def task_of(path: str, fields: Fields | None = None, pattern: str = r"w\d+") -> Task:
    return Task("rows", Source(path), fields or Fields(), judge_by_pattern(pattern))


def test_tasks_have_data_of_their_own_or_a_file() -> None:
    hub, file = read_tasks("gsm8k, math=test.jsonl", "--tasks")
    assert (hub.source.name, hub.source.split, hub.source.config) == ("openai/gsm8k", "test", "main")
    assert (file.source.name, file.source.split) == ("test.jsonl", "train")
    (folder,) = read_tasks("math=some/hub-name", "--tasks")
    assert folder.source.split == "test"
    (named,) = read_tasks("gsm8k", "--tasks", Source("a.jsonl", "train[5:]"))
    assert (named.source.name, named.source.split, named.shots) == ("a.jsonl", "train[5:]", None)


@pytest.mark.parametrize(
    ("text", "source", "complaint"),
    [
        ("gsm", None, r"unknown task 'gsm' \(--tasks\): use gsm8k, math; did you mean 'gsm8k'"),
        ("gsm8k,gsm8k=a.jsonl", None, "names gsm8k twice"),
        ("gsm8k,math", Source("a.jsonl"), "--tasks gsm8k=FILE,math=FILE"),
        ("", None, "unknown task ''"),
    ],
)
def test_mistakes_are_named(text: str, source: Source | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_tasks(text, "--tasks", source)


def test_a_problem_is_asked_as_the_harness_asks_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (task,) = read_tasks(f"gsm8k={write(tmp_path / 'rows.jsonl', PROBLEMS)}", "--tasks")
    first, *_ = questions(task, tokenizer)
    assert (first.prompt, first.completion) == ("Question: 0 plus w1?\nAnswer:", " w2 #### 0")
    rows = [{"problem": "w1", "solution": r"w2 $\boxed{3}$"}]
    (task,) = read_tasks(f"math={write(tmp_path / 'math.jsonl', rows)}", "--tasks")
    (only,) = questions(task, tokenizer)
    assert (only.prompt, only.completion) == ("Problem: w1\nSolution:", r" w2 $\boxed{3}$")


def test_shots_are_the_first_rows_which_are_then_not_judged(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (task,) = read_tasks(f"gsm8k={write(tmp_path / 'rows.jsonl', PROBLEMS)}", "--tasks")
    asked = questions(task, tokenizer, n_shot=2, limit=3)
    assert [question.number for question in asked] == [2, 3, 4]
    shots = "".join(f"Question: {n} plus w1?\nAnswer: w2 #### {n}\n\n" for n in range(2))
    assert asked[0].prompt == f"{shots}Question: 2 plus w1?\nAnswer:"
    assert asked[0].example.prompt == tokenizer(asked[0].prompt)["input_ids"]
    assert sum(asked[0].example.counted) == len(tokenizer(asked[0].completion)["input_ids"]) + 1


def test_shots_of_training_data_leave_all_rows_to_judge(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows, shown = write(tmp_path / "rows.jsonl", PROBLEMS[2:]), write(tmp_path / "shown.jsonl", PROBLEMS[:2])
    task = TASKS["gsm8k"]
    local = Task("gsm8k", Source(rows), task.fields, task.judge, task.stop, shots=Source(shown))
    asked = questions(local, tokenizer, n_shot=2)
    assert len(asked) == 4
    assert asked[0].prompt.startswith("Question: 0 plus w1?")


def test_of_a_conversation_the_last_turn_of_the_assistant_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Turns before it are in the prompt, and what comes after it is not there."""
    turns = [("user", "w4"), ("assistant", "w5"), ("user", "w6 w7"), ("assistant", "w8 w9"), ("user", "w3")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (only,) = questions(task_of(write(tmp_path / "rows.jsonl", [{"messages": messages}])), tokenizer)
    assert only.completion == "w8 w9"
    assert tokenizer.decode(only.example.prompt) == "w1 w4 w0 w5 <eos> w1 w6 w7 w0"
    sequence, counted = only.example.sequence, only.example.counted
    assert tokenizer.decode(sequence) == "w1 w4 w0 w5 <eos> w1 w6 w7 w0 w8 w9 <eos>"
    kept = [token for token, counts in zip(sequence, counted, strict=True) if counts]
    assert tokenizer.decode(kept) == "w8 w9 <eos>"


def test_prompt_and_completion_of_messages_are_asked_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": [{"role": "user", "content": "w4"}], "completion": [{"role": "assistant", "content": "w5"}]}
    (only,) = questions(task_of(write(tmp_path / "rows.jsonl", [row])), tokenizer)
    assert tokenizer.decode(only.example.prompt) == "w1 w4 w0"
    assert only.completion == "w5"


@pytest.mark.parametrize(
    ("rows", "changed", "complaint"),
    [
        ([{"prompt": "w1", "completion": "many"}], {}, r"row 0.*--answer_pattern"),
        ([{"prompt": "", "completion": "w4"}], {}, "empty prompt.*--skip_generation"),
        ([{"prompt": "w1", "completion": "w4"}], {"n_shot": 1}, "--n_shot 1 leaves none"),
        (
            [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}] * 2,
            {"n_shot": 1},
            "--n_shot needs prompts of text",
        ),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict], changed: dict, complaint: str
) -> None:
    task = task_of(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=complaint):
        questions(task, tokenizer, **changed)


def test_without_generation_rows_need_no_answer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "", "completion": "many"}])
    assert len(questions(task_of(path), tokenizer, generates=False)) == 1


def test_every_token_of_a_text_but_the_first_counts_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "text.txt"
    words = [f"w{number % 50}" for number in range(23)]
    path.write_text(" ".join(words))
    ids = tokenizer(path.read_text())["input_ids"]
    windows = read_text(str(path), tokenizer, 5)
    counted = [
        token for example in windows for token, counts in zip(example.sequence, example.counted, strict=True) if counts
    ]
    assert counted == ids[1:]
    assert max(len(example.sequence) for example in windows) == 6


def test_windows_of_a_text_begin_as_all_texts_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = with_added(of_bytes(None, "<s>", "</s>"), "<s>", "</s>")
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijk")
    windows = read_text(str(path), tokenizer, 5)
    assert [tokenizer.decode(window.sequence) for window in windows] == ["<s>abcde", "<s>efghi", "<s>ijk"]
    assert [window.counted for window in windows] == [[False] * 2 + [True] * 4] * 2 + [[False] * 2 + [True] * 2]


@pytest.mark.parametrize("content", [None, b"", b"w1", b"\xff\xfe\xff"])
def test_a_text_that_cannot_be_measured_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes | None
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="--perplexity"):
        read_text(str(path), tokenizer, 5)


def test_a_tokenizer_without_end_of_sequence_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match=r"has no end-of-sequence token.*: set eos_token in its tokenizer_config.json"):
        questions(task_of(write(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w2"}])), endless)


def test_of_several_tasks_the_one_whose_data_lack_a_column_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w2"}])
    (task,) = read_tasks(f"gsm8k={path}", "--tasks")
    with pytest.raises(UserError, match=r"^task gsm8k: the dataset has no column 'question'"):
        questions(task, tokenizer)
