"""The model to evaluate: a folder or hub name of a model or adapter, or a file of elements, put onto its base."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from agsel.elements import base_of, load_elements
from agsel.errors import AgselError, UserError, not_here_either, one_line, said_of

TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
"""Files of which a folder with a tokenizer has one."""


def load_model(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, on this rank's device, and tokenizer.

    Args:
        name: folder or hub name, or file of elements (`--model`).
        dtype: of the weights; `auto` as saved.

    Raises:
        UserError: it cannot be loaded, or is the folder of a run.
    """
    _refuse_run_folder(Path(name))
    try:
        if Path(name).is_file():
            with said_of("--model"):
                model, tokenizer = _load_elements(Path(name), dtype)
        elif find_adapter_config_file(name) is not None:
            model, tokenizer = _load_adapter(name, dtype)
        else:
            model = _load_whole(name, dtype)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except AgselError:
        raise
    except Exception as error:  # whatever other packages stumble over in these files
        said = one_line(error).rstrip(".")
        raise UserError(f"cannot load {name} (--model): {said}{not_here_either(name)}") from error
    return model.to(own_device()).eval(), tokenizer


def own_device() -> torch.device:
    """Of this rank."""
    if get_accelerator().device_name() != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def limit_memory(device: torch.device, fraction: float) -> None:
    """Keep this process to a fraction of its GPU's memory; what would go beyond finds none."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def fingerprint_of_files(name: str) -> list[list[str | int]]:
    """Names, sizes and times of local files, those of the base of an adapter or elements included; else the name."""
    path = Path(name)
    if not path.exists():
        return [[name]]
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.is_file()]
    states = [(file, file.stat()) for file in files]
    found: list[list[str | int]] = [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]
    if path.is_file():
        base = base_of(path)["base_model"]
        return found + (fingerprint_of_files(base) if base != name else [])
    if find_adapter_config_file(name) is None:
        return found
    from peft import PeftConfig  # slow to import, and rarely needed

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    return found + (fingerprint_of_files(base) if base != name else [])


def _load_whole(name: str, dtype: str, **options: Any) -> PreTrainedModel:
    """A model none of whose weights is missing: transformers draws those at random."""
    model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{name} (--model) lacks {len(missing)} of the model's weights, {missing[0]} for one: bring or download it "
            "anew"
        )
    return model


def _load_adapter(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from peft import PeftConfig, PeftModel  # slow to import, and rarely needed

    config = PeftConfig.from_pretrained(name)
    base = config.base_model_name_or_path
    if not base:
        raise UserError(
            f"the adapter {name} (--model) names no base model: write base_model_name_or_path into its "
            "adapter_config.json"
        )
    if Path(name).is_dir() and not Path(base).is_dir() and base.startswith(("/", ".")):
        raise UserError(
            f"the base model of the adapter {name} (--model) is not at {base}: put it there, or correct "
            f"base_model_name_or_path in {Path(name, 'adapter_config.json')}"
        )
    remedy = "put it there, or correct base_model_name_or_path in its adapter_config.json"
    model = _load_base(base, dtype, config.revision, f"the adapter {name} (--model)", remedy)
    tokenizer = AutoTokenizer.from_pretrained(name if not Path(name).is_dir() or _has_tokenizer(Path(name)) else base)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # as for training
        model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(model, name, autocast_adapter_dtype=False), tokenizer


def _load_elements(file: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base model with trained elements; the tokenizer is that of the run, if the file lies where a run has put it."""
    about = base_of(file)
    base, of_training = about["base_model"], about.get("dtype", "auto")
    remedy = "put it there, or load it in Python and call agsel.load_elements"
    own = of_training if dtype == "auto" else dtype
    model = _load_base(base, own, about.get("revision"), f"the elements {file} (--model)", remedy)
    load_elements(model, file)
    of_run = file.parent / "model"
    return model, AutoTokenizer.from_pretrained(of_run if _has_tokenizer(of_run) else base)


def _load_base(base: str, dtype: str, revision: str | None, of_what: str, remedy: str) -> PreTrainedModel:
    try:
        return _load_whole(base, dtype, revision=revision)
    except AgselError:
        raise
    except Exception as error:  # as of load_model
        raise UserError(f"cannot load {base}, the base model of {of_what}: {one_line(error)}; {remedy}") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER)


def _refuse_run_folder(folder: Path) -> None:
    inside = folder / "model"
    is_run = any((inside / file).is_file() for file in ("config.json", "adapter_config.json"))
    if is_run and not (folder / "config.json").is_file():
        raise UserError(f"{folder} (--model) is the folder of a run: name its model, {inside}")
