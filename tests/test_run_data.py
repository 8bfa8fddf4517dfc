"""The datasets of a run: mixtures, what is evaluated on, and what is said of them; each mistake in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from agsel.data.fields import Fields
from agsel.errors import UserError
from agsel.training.data import RunData, load_data, require_data, require_labels, split_off, training_sources
from agsel.training.row_trainer import choose_learning
from tests.test_launch import said, several_runs
from tests.tiny_run import save_model, save_rows, settings

NOTHING = {
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "datasets": None,
    "eval_dataset": None,
    "eval_split_fraction": None,
    "eval_tasks": None,
    "eval_strategy": "no",
    "seed": 42,
}
TALK = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
UNMAPPED = Fields()
MAPPED = Fields(prompt_field="question", completion_field="answer")


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path: Path, number: int, word: str = "w5") -> str:
    return lines(path, *({"prompt": f"w{index}", "completion": word} for index in range(number)))


def load(fields: Fields = UNMAPPED, **changed: Any) -> RunData:
    values = NOTHING | changed
    require_data(values, fields)
    return load_data(values, fields)


def refuse(read: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        read()
    for part in words:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def mixture(tmp_path: Path) -> list[dict[str, Any]]:
    """Six texts, and two conversations of one row each."""
    shared = [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w4"}]
    return [
        {"path": texts(tmp_path / "texts.jsonl", 6)},
        {
            "path": lines(tmp_path / "talks.jsonl", {"messages": TALK, "tools": [{}]}),
            "columns": ["messages"],
        },
        {"path": lines(tmp_path / "shared.jsonl", {"conversations": shared, "id": 1})},
    ]


@pytest.mark.parametrize("write", [dict, json.dumps], ids=["file", "command line"])
def test_each_of_several_datasets_has_a_format_of_its_own(mixture: list[dict[str, Any]], write: Any) -> None:
    data = load(datasets=[write(entry) for entry in mixture])
    assert data.train["completion"][:] == ["w5"] * 6 + [None] * 2
    assert [json.loads(talk) for talk in data.train["messages"][6:]] == [TALK, TALK]
    assert data.train["tools"][:] == [None] * 8
    assert data.train["agsel_row"][:] == list(range(8))
    assert data.held_out is None
    assert [line.partition(" [train]: ")[2] for line in data.said] == [
        "prompt and completion (prompt, completion), 6 rows",
        "messages (messages), 1 rows",
        "ShareGPT conversations (conversations), 1 rows; dropped: id",
    ]


def test_datasets_may_have_shares_of_the_whole(tmp_path: Path) -> None:
    """The largest whole that needs no row twice: of 6 and 8 rows, three to one, all 6 and 2."""
    parts = {"a": texts(tmp_path / "a.jsonl", 6, "a"), "b": texts(tmp_path / "b.jsonl", 8, "b")}
    entries = [{"path": parts["a"], "fraction": 0.75}, {"path": parts["b"], "fraction": 0.25}]
    train = load(datasets=entries).train
    assert train["completion"][:] == ["a"] * 6 + ["b"] * 2
    assert train["prompt"][6:] == ["w0", "w1"]
    third = {"path": texts(tmp_path / "c.jsonl", 3, "c")}
    rounded = load(datasets=[third | {"fraction": fraction} for fraction in (7, 3)]).train
    assert rounded["prompt"][:] == ["w0", "w1", "w2", "w0"], "3 / 0.7 * 0.7 is a little less than 3"
    assert load(datasets=[entry | {"fraction": 5} for entry in entries]).train["completion"][:] == ["a"] * 6 + ["b"] * 6


def test_datasets_are_named_as_trl_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    texts(folder / "train.jsonl", 3)
    texts(folder / "test.jsonl", 4)
    for entry, rows in [
        ({"path": str(folder)}, 3),
        ({"path": str(folder), "split": "test[1:]"}, 3),
        ({"path": str(tmp_path), "data_dir": "data", "split": "test"}, 4),
        ({"path": "json", "data_dir": str(folder)}, 3),
        ({"path": "json", "data_files": str(folder / "t*.jsonl")}, 7),
        ({"path": "json", "data_files": {"train": [str(folder / "test.jsonl")]}, "name": None}, 4),
    ]:
        assert len(load(datasets=[entry]).train) == rows, entry
    source = training_sources(NOTHING | {"datasets": [{"path": "some/hub", "name": "main", "data_dir": "x"}]})[0]
    assert (source.name, source.config, source.folder, source.flag) == ("some/hub", "main", "x", "datasets: path")


WRONG_ENTRIES: dict[str, tuple[list[Any], str]] = {
    "no path": ([{"name": "main"}], "datasets: {'name': 'main'} has no path: write one `path: NAME_OR_FILE`"),
    "a word": (["rows.jsonl"], "datasets: 'rows.jsonl' has no path: write one `path:"),
    "number": ([5], "datasets: 5 has no path"),
    "unknown": ([{"path": "a", "splits": "train"}], "datasets: unknown setting 'splits'; did you mean 'split'?"),
    "truth value": ([{"path": "a", True: 1}], "datasets: unknown setting True"),
    "one column": ([{"path": "a", "columns": "text"}], "datasets: columns is 'text': it must be a list"),
    "files": ([{"path": "json", "data_files": 5}], "datasets: data_files is 5: it must be text or a list or a mapping"),
    "split": ([{"path": "a", "split": 5}], "datasets: split is 5: it must be text"),
    "path": ([{"path": ["a"]}], "datasets: path is ['a']: it must be text"),
    "fraction": ([{"path": "a", "fraction": "half"}], "datasets: fraction is 'half': it must be a number"),
    "no share": ([{"path": "a", "fraction": 0}], "datasets: fraction is 0 for one: give every dataset one above 0"),
    "one share": ([{"path": "a", "fraction": 1}, {"path": "a"}], "datasets: fraction is None for one: give every"),
    "no file": ([{"path": "nowhere.jsonl"}], "no such file: nowhere.jsonl (datasets: path)"),
    "no files": ([{"path": "json"}], "no dataset: name a hub dataset, a folder or a .json"),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_what_is_no_dataset_is_refused(name: str) -> None:
    entries, words = WRONG_ENTRIES[name]
    refuse(partial(load, datasets=entries), words)


def test_a_share_without_a_row_is_refused(tmp_path: Path) -> None:
    shares = {"few": 0.001, "many": 0.999}
    entries = [{"path": texts(tmp_path / f"{name}.jsonl", 9), "fraction": share} for name, share in shares.items()]
    refuse(partial(load, datasets=entries), "datasets: fraction 0.001 leaves its dataset no row: raise it")


def test_a_row_of_several_datasets_is_refused_with_the_name_of_its_dataset(tmp_path: Path) -> None:
    entries = [{"path": texts(tmp_path / f"{number}.jsonl", 3, word)} for number, word in enumerate(["a", " "])]
    refuse(partial(load, datasets=entries), f"{tmp_path}/1.jsonl: row 0 of the dataset has nothing to learn")


def test_datasets_and_a_dataset_are_one_too_many(mixture: list[dict[str, Any]]) -> None:
    for name in ("dataset_name", "dataset_config"):
        refuse(partial(load, datasets=mixture, **{name: "x"}), f"--{name} and datasets are both given: leave one out")


def test_what_is_evaluated_on(tmp_path: Path) -> None:
    train, other = texts(tmp_path / "train.jsonl", 6), texts(tmp_path / "other.jsonl", 3, "w9")
    data = load(dataset_name=train, eval_dataset=other, eval_strategy="steps")
    assert data.held_out is not None
    assert data.held_out["completion"][:] == ["w9"] * 3
    assert data.said[1] == f"{other} [train]: prompt and completion (prompt, completion), 3 rows; to evaluate on"
    data = load(dataset_name=str(tmp_path / "train.jsonl"), dataset_train_split="train[:4]", eval_strategy="no")
    assert (len(data.train), data.held_out) == (4, None)
    (tmp_path / "data").mkdir()
    for split, number in {"train": 4, "test": 2, "validation": 3}.items():
        texts(tmp_path / "data" / f"{split}.jsonl", number)
    folder = str(tmp_path / "data")
    for split, number in {"test": 2, "validation": 3}.items():
        for named in ({"dataset_name": folder}, {"dataset_name": train, "eval_dataset": folder}):
            data = load(**named, dataset_test_split=split, eval_strategy="epoch")
            assert data.held_out is not None
            assert len(data.held_out) == number


def test_a_part_of_the_rows_is_split_off(tmp_path: Path) -> None:
    name = texts(tmp_path / "rows.jsonl", 40)
    data = load(dataset_name=name, eval_split_fraction=0.05, eval_strategy="steps")
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (38, 2)
    assert data.said[1] == "2 of these rows to evaluate on (--eval_split_fraction), 38 to train on"
    numbers = [data.train["agsel_row"][:], data.held_out["agsel_row"][:]]
    assert sorted(numbers[0] + numbers[1]) == list(range(40))
    assert all(part == sorted(part) for part in numbers)
    again, other = (split_off(load(dataset_name=name).train, 0.05, seed)[1]["agsel_row"][:] for seed in (42, 43))
    assert again == numbers[1] != other


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_both_parts_must_have_rows(tmp_path: Path, fraction: float) -> None:
    wanted = {"eval_split_fraction": fraction, "eval_strategy": "steps"}
    read = partial(load, dataset_name=texts(tmp_path / "rows.jsonl", 3), **wanted)
    refuse(read, f"--eval_split_fraction {fraction} of 3 rows leaves no rows for one of both")


WRONG_EVALUATION: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"eval_dataset": "a", "eval_split_fraction": 0.1}, "--eval_dataset and --eval_split_fraction are both"),
    "never": ({"eval_dataset": "a", "eval_strategy": "no"}, "--eval_dataset would never be read: set --eval_strategy"),
    "never split": (
        {"eval_split_fraction": 0.1, "eval_strategy": "no"},
        "--eval_split_fraction would never be read: set --eval_strategy to steps or epoch too",
    ),
    "all": ({"eval_split_fraction": 1.0}, "--eval_split_fraction is 1.0: it must be above 0 and below 1, for exam"),
    "none": ({"eval_split_fraction": 0.0}, "--eval_split_fraction is 0.0: it must be above 0"),
    "no number": ({"eval_split_fraction": float("nan")}, "--eval_split_fraction is nan: it must be above 0"),
    "one file": ({}, "is one file, which has the split train, not 'test' (--dataset_train_split, --dataset_test_sp"),
    "no file": ({"eval_dataset": "nowhere.jsonl"}, "no such file: nowhere.jsonl (--eval_dataset)"),
    "several": (
        {"datasets": [{"path": "json", "data_files": "FILE"}], "dataset_name": None},
        "nothing to evaluate on: beside datasets name it with --eval_dataset, or split it off with",
    ),
}


@pytest.mark.parametrize("name", WRONG_EVALUATION)
def test_what_cannot_be_evaluated_on_is_refused(tmp_path: Path, name: str) -> None:
    changed, words = WRONG_EVALUATION[name]
    path = texts(tmp_path / "rows.jsonl", 3)
    changed = json.loads(json.dumps(changed).replace("FILE", path))
    refuse(partial(load, **{"dataset_name": path, "eval_strategy": "steps"} | changed), words)


def test_a_row_to_evaluate_on_is_said_to_be_one(tmp_path: Path) -> None:
    train, other = texts(tmp_path / "a.jsonl", 3), lines(tmp_path / "b.jsonl", {"prompt": "a", "completion": None})
    read = partial(load, dataset_name=train, eval_dataset=other, eval_strategy="steps")
    refuse(read, "evaluation data: row 0 of the dataset, column completion: holds null, not text")


def test_fields_are_those_of_all_datasets(tmp_path: Path) -> None:
    train, other = save_rows(tmp_path / "a.jsonl", 3), save_rows(tmp_path / "b.jsonl", 2)
    data = load(MAPPED, dataset_name=str(train), eval_dataset=str(other), eval_strategy="steps")
    assert data.held_out is not None
    assert len(data.held_out) == 2
    plain = texts(tmp_path / "c.jsonl", 2)
    read = partial(load, MAPPED, dataset_name=str(train), eval_dataset=plain, eval_strategy="steps")
    refuse(read, "evaluation data: the dataset has no column 'question' (--prompt_field): it has prompt, completion")


def test_of_a_large_file_only_the_beginning_is_looked_at_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agsel.training.data.READ_EARLY", 50)
    late = lines(tmp_path / "rows.jsonl", *[{"prompt": "a", "completion": "b"}] * 2, {"prompt": "a", "completion": 5})
    values = NOTHING | {"dataset_name": late}
    require_data(values, Fields())
    refuse(lambda: load_data(values, Fields()), "row 2 of the dataset, column completion: holds a number (5)")
    other = NOTHING | {"dataset_name": lines(tmp_path / "other.jsonl", *[{"question": "a", "answer": "b"}] * 9)}
    refuse(lambda: require_data(other, Fields()), "has the columns question, answer: say which")
    require_data(NOTHING | {"dataset_name": "some/hub-dataset"}, Fields())


def test_rows_that_lost_all_labels_are_refused_with_their_number() -> None:
    rows = Dataset.from_dict({"agsel_row": [0, 1, 2, 3]})
    tokenised = Dataset.from_dict({"labels": [[1]] * 3, "agsel_row": [0, 3, 1]})
    refuse(lambda: require_labels(tokenised, rows, 16), "row 2 of the dataset has no label", "--max_length 16 (1 of 4")
    require_labels(tokenised.select([0, 2]), rows.select([0, 1]), 16)
    packed = Dataset.from_dict({"labels": [[-100, 5], [-100, -100]]})
    refuse(lambda: require_labels(packed, rows, 2), "a packed sequence has no label left", "--max_length 2: raise")
    require_labels(packed.select([0]), rows, 2)


def test_what_the_assistant_says_is_learnt_if_there_are_conversations(mixture: list[dict[str, Any]]) -> None:
    class Training:
        completion_only_loss: bool | None = None
        assistant_only_loss: bool | None = None

    training: Any = Training()
    text = load(datasets=mixture[:1]).train
    assert choose_learning(training, text).assistant_only
    assert training.assistant_only_loss is False, "TRL would look for marks"
    training.assistant_only_loss = True
    refuse(lambda: choose_learning(training, text), "--assistant_only_loss needs conversations")
    assert choose_learning(training, load(datasets=mixture).train).assistant_only
    training.completion_only_loss = training.assistant_only_loss = False
    learning = choose_learning(training, text)
    assert (learning.completions_only, learning.assistant_only) == (False, False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What runs of a mixture and of too few rows ended with."""
    folder = tmp_path_factory.mktemp("runs")
    model, table = save_model(folder / "model"), folder / "table.csv"
    table.write_text('prompt,completion,id\n"w3, w4",w5 w6 w7 w8,1\n' + "w3,w4,2\n" * 7)
    mixture = {"datasets": [{"path": str(table)}, {"path": lines(folder / "talks.jsonl", *[{"messages": TALK}] * 8)}]}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    unmapped = dict.fromkeys(("dataset_name", "prompt_field", "completion_field", "completion_template"))
    mixed = unmapped | {"config": folder / "mixture.yaml", "max_steps": 1, "max_length": 5}
    mixed |= {"eval_split_fraction": 0.25, "eval_strategy": "steps", "eval_steps": 1, "dataset_num_proc": 2}
    changed = {
        "mixture": mixed,
        "few": {"per_device_train_batch_size": 32, "dataloader_drop_last": True},
    }
    rows = save_rows(folder / "rows.jsonl", 16)
    cases = {name: settings(model, rows, folder / name, **values) for name, values in changed.items()}
    return {"folder": folder, **several_runs(folder, cases)}


def test_a_run_says_what_its_data_is_and_what_is_learnt_of_it(runs: dict[str, Any]) -> None:
    code, output, steps = runs["mixture"]
    assert (code, steps) == (0, 1), output
    shown = [line for line in output.splitlines() if line.startswith(("data ", "tokens "))]
    folder = runs["folder"]
    assert shown[:3] == [
        f"data      {folder}/table.csv [train]: prompt and completion (prompt, completion), 8 rows; dropped: id",
        f"data      {folder}/talks.jsonl [train]: messages (messages), 8 rows",
        "data      4 of these rows to evaluate on (--eval_split_fraction), 12 to train on",
    ]
    assert [line.partition(":")[0] for line in shown[3:]] == ["tokens    train", "tokens    eval"]
    assert [line.count(" cut at --max_length 5, without their end token") for line in shown[3:]].count(1) == 1
    assert "eval loss " in output


def test_a_run_without_a_whole_batch_is_refused(runs: dict[str, Any]) -> None:
    code, output, _ = runs["few"]
    assert code == 2
    (line,) = said(output)
    assert "no optimizer step: 16 sequences fill no batch of 32 on each of 1 ranks, and --dataloader_drop_last" in line
    assert "Traceback" not in output
