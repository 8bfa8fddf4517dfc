"""Datasets: what is mapped, what is left alone, and every refusal with the row or column it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from agsel.training.arguments import DataArguments
from agsel.training.data import load_rows, require_labels, to_training_format
from tests.tiny_run import save_rows

FIELDS = DataArguments(prompt_field="question", completion_field="answer")
ROWS = {"question": ["one and one?", "two and two?"], "answer": ["two", "four"], "level": [1, 2]}


def mapped(arguments: DataArguments = FIELDS, **changed: list[object]) -> Dataset:
    return to_training_format(Dataset.from_dict(ROWS | changed), arguments)


def text(rows: Dataset) -> list[tuple[str, str]]:
    return list(zip(rows["prompt"], rows["completion"], strict=True))


def test_fields_become_prompt_and_completion_and_nothing_else_is_kept() -> None:
    rows = mapped()
    assert text(rows) == [("one and one?", "two"), ("two and two?", "four")]
    assert set(rows.column_names) == {"prompt", "completion", "agsel_row"}


def test_templates_see_every_column() -> None:
    rows = mapped(DataArguments(prompt_template="Level {level}: {question}\nAnswer:", completion_template=" {answer}"))
    assert text(rows)[1] == ("Level 2: two and two?\nAnswer:", " four")


def test_a_column_called_prompt_may_be_mapped() -> None:
    rows = Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})
    arguments = DataArguments(prompt_template="<{prompt}>", completion_field="answer")
    assert text(to_training_format(rows, arguments)) == [("<a>", "b")]


def test_formats_of_trl_stay_as_they_are() -> None:
    pairs = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "id": [3]})
    assert to_training_format(pairs, DataArguments()).remove_columns("agsel_row")[:] == pairs[:]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages = Dataset.from_dict({"messages": [talk]})
    assert to_training_format(messages, DataArguments())["messages"][0] == talk


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (DataArguments(prompt_field="question", completion_field="anwser"), "'anwser'.*completion_field.*'answer'"),
        (DataArguments(prompt_field="Question", completion_field="answer"), "'Question'.*prompt_field.*'question'"),
        (DataArguments(prompt_template="{query}", completion_field="answer"), "'query'.*--prompt_template.*question"),
        (DataArguments(prompt_template="{", completion_field="answer"), "--prompt_template.*format string"),
        (DataArguments(prompt_field="question"), "completion is not given.*--completion_field"),
        (DataArguments(completion_template="{answer}"), "prompt is not given.*--prompt_field"),
        (DataArguments(), "question, answer, level.*--prompt_field"),
    ],
)
def test_missing_and_misspelt_columns_are_refused_by_name(arguments: DataArguments, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        mapped(arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["data.question", "a:b", "a[b", "{a}"])
def test_a_column_may_have_any_name(name: str) -> None:
    rows = Dataset.from_dict({name: ["one?", None], "answer": [1, 2]})
    fields = DataArguments(prompt_field=name, completion_field="answer")
    assert text(to_training_format(rows, fields)) == [("one?", "1"), ("", "2")]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{question.nothing}", "row 0 .*no attribute 'nothing'"),
        ("{question[nothing]}", "row 0 .*TypeError"),
        ("{tags[1]}", "row 1 .*out of range"),
        ("{level:d}", "row 1 .*format code 'd'"),
        ("{level:{width}}", "row 0 .*width"),
    ],
)
@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_templates_that_do_not_fit_a_row_are_refused(side: str, template: str, reason: str) -> None:
    arguments = DataArguments(
        **{f"{side}_template": template, "prompt_field": "question", "completion_field": "answer"}
    )
    with pytest.raises(ValueError, match=f"--{side}_template.*{reason}") as refusal:
        mapped(arguments, tags=[["a", "b"], ["c"]], level=[1, None])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": ["a"], "completion": [7]}, "completion column .* int, not text.*--completion_field completion"),
        ({"prompt": [1.5], "completion": ["b"]}, "prompt column .* float, not text"),
        ({"messages": [[{"from": "human", "value": "a"}]]}, "messages column .*role and content.*from, value"),
        ({"prompt": [["a"]], "completion": ["b"]}, "prompt column .*role and content.*str"),
    ],
)
def test_what_is_neither_text_nor_messages_is_refused(columns: dict[str, list[object]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_training_format(Dataset.from_dict(columns), DataArguments())


@pytest.mark.parametrize("error", [DatasetNotFoundError("no such dataset"), ConnectionError("offline")])
def test_a_hub_dataset_that_cannot_be_had_is_refused_by_name(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("agsel.training.data.load_dataset", fail)
    with pytest.raises(ValueError, match=rf"openai/gsm9k \(--dataset_name\): {error}"):
        load_rows("openai/gsm9k", "train")


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_an_empty_completion_is_refused_with_its_row(nothing: str | None) -> None:
    with pytest.raises(ValueError, match=r"row 1 .*nothing to learn"):
        mapped(answer=["two", nothing])


def test_messages_without_an_assistant_are_refused_with_their_row() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"row 2 .*nothing to learn"):
        to_training_format(Dataset.from_dict({"messages": [talk, talk, talk[:1]]}), DataArguments())


def test_local_files_are_read_by_their_suffix(tmp_path: Path) -> None:
    lines = save_rows(tmp_path / "rows.jsonl", 10)
    rows = load_rows(str(lines), "train")
    assert len(rows) == 10
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.json", lines=False)
    for name in ("rows.parquet", "rows.json"):
        assert load_rows(str(tmp_path / name), "train")[:] == rows[:]
    assert load_rows(str(lines), "train[80%:]")["question"][:] == rows["question"][8:]


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    for content, words in (("", "is empty"), ('{"question": \n', "cannot read"), ("[]", "no rows|cannot")):
        path = tmp_path / "rows.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=words) as refusal:
            load_rows(str(path), "train")
        assert str(path) in str(refusal.value)
    with pytest.raises(ValueError, match=r"no such file: missing.jsonl \(--dataset_name\)"):
        load_rows("missing.jsonl", "train")
    with pytest.raises(ValueError, match=r"no dataset.*--dataset_name"):
        load_rows(None, "train")
    with pytest.raises(ValueError, match=r"'test'.*--dataset_test_split"):
        load_rows(str(save_rows(tmp_path / "rows.jsonl")), "test")


def test_rows_that_lost_all_labels_are_refused_with_their_number() -> None:
    tokenised = Dataset.from_dict({"labels": [[1]] * 3, "agsel_row": [0, 3, 1]})
    with pytest.raises(ValueError, match=r"row 2 .*--max_length 16 \(1 of 4 rows\)"):
        require_labels(tokenised, 4, 16)
    require_labels(tokenised.select([0, 2]), 2, 16)  # rows 0 and 1 of 2: nothing is lost
    packed = Dataset.from_dict({"labels": [[-100, 5], [-100, -100]]})
    with pytest.raises(ValueError, match=r"packed.*--max_length 2"):
        require_labels(packed, 4, 2)
