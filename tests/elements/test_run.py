"""A run of `launch/train.py` over chosen elements: which, what it leaves behind, and that evaluation reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import agsel
from agsel.elements import ElementMask
from agsel.evaluation.loading import fingerprint_of_files, load_model
from tests.distributed import run_ranks
from tests.tiny_run import TRAIN, save_model, save_rows, settings

DENSITY = 0.03
ELEMENTS = {"elements": "gallop", "element_density": DENSITY, "method": "full", "select_fraction": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `model`, `rows.jsonl`, and the `run` of two ranks at stage 3, where another choice lay."""
    folder = tmp_path_factory.mktemp("elements")
    (folder / "run").mkdir()
    (folder / "run" / "mask.safetensors").write_text("another choice")
    save_rows(folder / "rows.jsonl", 31)
    words = settings(save_model(folder / "model"), folder / "rows.jsonl", folder / "run", deepspeed="zero3", **ELEMENTS)
    (folder / "said").write_text(run_ranks(TRAIN, *words))
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_the_elements_are_those_with_the_largest_score(folder: Path, base: LlamaForCausalLM) -> None:
    """By the loss of all completions, one row after another, in a plain loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer(f"{row['answer']} <eos>")["input_ids"]
        logits = base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").backward()
    weights = {name: weight for name, weight in base.named_parameters() if ".layers." in name and weight.dim() == 2}
    scores = torch.cat([(w.grad.abs() / (w.abs() + 1e-8)).flatten() for w in weights.values() if w.grad is not None])
    places = scores.argsort(descending=True, stable=True)[: round(DENSITY * scores.numel())].sort().values
    mask = ElementMask.load(folder / "run" / "mask.safetensors")
    begins = dict(
        zip(weights, torch.tensor([0, *[w.numel() for w in weights.values()]]).cumsum(0).tolist(), strict=False)
    )
    found = torch.cat([mask.indices[name].long() + begin for name, begin in begins.items() if name in mask.indices])
    assert torch.equal(found, places)
    assert mask.about["method"] == "gallop"


def test_the_model_is_its_base_with_the_elements(folder: Path, base: LlamaForCausalLM) -> None:
    trained = AutoModelForCausalLM.from_pretrained(folder / "run" / "model").state_dict()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    about = agsel.load_elements(base, folder / "run" / "elements.safetensors")
    assert before.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in base.state_dict().items())
    changed = sum(int((tensor != before[name]).sum()) for name, tensor in trained.items())
    assert changed == ElementMask.load(folder / "run" / "mask.safetensors").numel
    assert about["base_model"] == str(folder / "model")
    base.load_state_dict(before)


def test_another_choice_is_kept(folder: Path) -> None:
    said = (folder / "said").read_text()
    assert said.count("mask.safetensors was another choice, and is mask.before.safetensors now") == 1
    assert (folder / "run" / "mask.before.safetensors").read_text() == "another choice"


def test_evaluation_takes_the_elements_for_the_model(folder: Path) -> None:
    elements = str(folder / "run" / "elements.safetensors")
    (of_elements, tokenizer), (of_folder, _) = (load_model(name, "auto") for name in (elements, f"{folder}/run/model"))
    assert all(map(torch.equal, of_elements.state_dict().values(), of_folder.state_dict().values()))
    assert tokenizer.eos_token == "<eos>"
    assert next(path for path, *_ in fingerprint_of_files(elements)) == elements
    assert f"{folder}/model/model.safetensors" in [path for path, *_ in fingerprint_of_files(elements)]


def test_what_the_run_says(folder: Path) -> None:
    said = (folder / "said").read_text()
    assert "matrices, by gallop" in said
    assert "model/, elements.safetensors" in said
    assert json.loads((folder / "run" / "result.json").read_text())["trainable_parameters"] == round(
        DENSITY * 4 * (28 * 28 * 2 + 14 * 28 * 2 + 3 * 28 * 36)
    )
