"""What is asked of a model folder, and of the settings about it, before a run starts."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, SFTConfig, get_peft_config

from agsel.blocks import Block, find_blocks, taking_part
from agsel.data.tokens import Learning
from agsel.errors import UserError
from agsel.evaluation.loading import load_model
from agsel.monitor import METRICS, SELECTION
from agsel.monitor.history import read_lines
from agsel.training import packages, room
from agsel.training.generation import mend, require_generation_config
from agsel.training.lora import adapter_of, blank_model, settle_targets
from agsel.training.model import agree_on_settings, init_kwargs, require_model
from agsel.training.packages import require_packages
from agsel.training.summary import Steps
from agsel.training.tokenizer import (
    load_tokenizer,
    require_chat_template,
    require_known_positions,
    require_known_tokens,
    require_tokenizer,
)
from tests.test_blocks import tiny_decoder
from tests.test_launch import several_runs
from tests.tiny import VOCABULARY, adapted_model, tiny_model
from tests.tiny_run import save_model, save_rows, settings

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 12345\n"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
TALK = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]
TALKS = Dataset.from_list(
    [{"messages": json.dumps(TALK), "tools": None, "first_learnt": 0, "agsel_row": 0}]
).add_column("completion", [None])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(whole, tmp_path / "model")


def training(**changed: Any) -> SFTConfig:
    return SFTConfig(**{"output_dir": "run", "use_cpu": True, "bf16": False, "report_to": "none"} | changed)


def named(folder: Path, **changed: Any) -> ModelConfig:
    return ModelConfig(**{"model_name_or_path": str(folder), "dtype": None} | changed)


def ask(folder: Path, **changed: Any) -> None:
    require_model(named(folder), training(**changed))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def change_config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder / "config.json", **values)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 1)


def shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="70KB")
    assert {path.name for path in folder.glob("*.safetensors")} == {*SHARDS}


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[1]).unlink()


def cut_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes()[:5000])


def pickle(folder: Path, **options: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin", **options)


def cut_pickle(folder: Path) -> None:
    pickle(folder)
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-100])


def lose_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))


def leave_the_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (write("model.safetensors", POINTER), "model.safetensors is the pointer that Git LFS leaves"),
    "pointer for a tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is the pointer that Git LFS leaves"),
    "pointer for config.json": (write("config.json", POINTER), "config.json is the pointer that Git LFS leaves"),
    "cut": (cut, "model.safetensors is damaged or cut short (Error while deserializing header: incomplete metadata"),
    "header": (write("model.safetensors", "<html>404 Not Found</html>"), "header too large; it has 26 bytes)"),
    "empty": (write("model.safetensors", ""), "model.safetensors is damaged or cut short"),
    "no weights": (remove("model.safetensors"), "(--model_name_or_path) holds no weights: it needs model.safetensors"),
    "shard": (lose_a_shard, f"{SHARDS[1]} is missing, which model.safetensors.index.json names (1 of 2 files are)"),
    "cut shard": (cut_a_shard, f"{SHARDS[0]} is damaged or cut short"),
    "cut pickle": (cut_pickle, "pytorch_model.bin is damaged or cut short (neither a zip archive nor a pickle"),
    "pickled shard": (lose_a_pickle, "pytorch_model-1.bin is missing, which pytorch_model.bin.index.json names"),
    "no config": (remove("config.json"), "(--model_name_or_path) is no model: it has no config.json"),
    "adapter": (leave_the_adapter, "holds an adapter alone: merge it into its model"),
    "no JSON": (write("config.json", '{"model_type": '), "config.json cannot be read, Expecting value"),
    "a list": (write("config.json", "[]"), "config.json is no JSON object"),
    "generation list": (write("generation_config.json", "[]"), "generation_config.json is no JSON object"),
    "type": (change_config(model_type="lama"), "has the model_type 'lama', which transformers"),
    "size": (change_config(hidden_size="28"), "(--model_name_or_path): Validation error for field 'hidden_size'"),
    "null": (change_config(architectures=None), 'names no architecture: write, for example, "architectures": ["LlamaF'),
    "none": (change_config(architectures=[]), "names no architecture"),
    "base model": (change_config(architectures=["LlamaModel"]), "is a LlamaModel, which generates no text"),
}


def one_line(refusal: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_before_it_is_loaded(folder: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError) as refusal:
        ask(folder)
    assert words in one_line(refusal)
    assert "--model_name_or_path" in str(refusal.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: None,
        shard,
        pickle,
        lambda folder: pickle(folder, _use_new_zipfile_serialization=False),
        remove("generation_config.json"),
        write("tf_model.h5", POINTER),
    ],
    ids=["one file", "shards", "pickle", "old pickle", "no generation settings", "a pointer that nobody needs"],
)
def test_a_whole_folder_is_accepted(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder)
    ask(folder)
    LlamaForCausalLM.from_pretrained(folder)


def test_weights_in_other_files_are_left_to_transformers(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.half.safetensors")
    ask(folder, model_init_kwargs={"variant": "half"})


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a file \(--model_name_or_path\): name its folder"):
        ask(folder / "model.safetensors")


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_refused() -> None:
    with pytest.raises(UserError, match=r"^cannot load no/where \(--model_name_or_path\): .*no such folder here"):
        ask(Path("no/where"))


GENERATION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}),
    "silent": ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
    "no beams": ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": True, "length_penalty": 2.0}),
    "scores": ({"output_scores": True}, {"output_scores": True}),
    "padding": ({"pad_token_id": -1}, {"pad_token_id": -1}),
    "sampling": ({"do_sample": True, "temperature": 0.6}, {}),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_settings_without_effect_are_unset(folder: Path, name: str) -> None:
    given, unset = GENERATION[name]
    (folder / "generation_config.json").write_text(json.dumps(given))
    require_generation_config(named(folder))
    config = GenerationConfig.from_pretrained(folder)
    assert mend(config) == unset
    config.save_pretrained(folder)
    kept = GenerationConfig.from_pretrained(folder)
    assert {setting: getattr(kept, setting) for setting in given} == given | dict.fromkeys(unset)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_return_sequences": 3}, "`num_return_sequences` different than 1"),
        ({"cache_implementation": "cash"}, "Invalid `cache_implementation`"),
        ({"suppress_tokens": [2], "forced_eos_token_id": 2}, "Every token in `forced_eos_token_id`"),
        ({"max_new_tokens": "5"}, "'<=' not supported"),
    ],
    ids=lambda given: next(iter(given), ""),
)
def test_generation_settings_that_contradict_each_other_are_refused(
    folder: Path, given: dict[str, Any], words: str
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(given))
    with pytest.raises(UserError) as refusal:
        require_generation_config(named(folder))
    assert words in one_line(refusal)
    assert f"generation_config.json of {folder} (--model_name_or_path)" in str(refusal.value)


def no_ending(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None


def added(**tokens: Any) -> Callable[[PreTrainedTokenizerBase], object]:
    return lambda tokenizer: tokenizer.add_special_tokens(tokens)


def tokenizer_of(folder: Path, alter: Callable[[PreTrainedTokenizerBase], object]) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alter(tokenizer)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(named(folder), training())


TOKENIZERS: dict[str, tuple[Callable[[PreTrainedTokenizerBase], object], dict[str, str], str]] = {
    "no ending": (no_ending, {}, "has no end-of-sequence token, by which a model learns to stop: name one of its"),
    "ending": (no_ending, {"eos_token": "<end>"}, "'<end>' is no token of the tokenizer"),
    "padding": (lambda tokenizer: None, {"pad_token": "<end>"}, "name one of its tokens (--pad_token)"),
    "word": (lambda tokenizer: tokenizer.add_tokens(["w"]), {}, "has 62 tokens, but the model has an embedding of 61"),
    "ending outside": (added(eos_token="<end>"), {}, "embedding of 61: token 61, '<end>', is none of them"),
    "padding outside": (added(pad_token="<end>"), {}, "embedding of 61: token 61, '<end>', is none of them"),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, fault: str) -> None:
    alter, changed, words = TOKENIZERS[fault]
    tokenizer = tokenizer_of(folder, alter)
    config = LlamaConfig.from_pretrained(folder)
    with pytest.raises(UserError) as refusal:
        require_tokenizer(tokenizer, config, training(**changed))
    assert words in one_line(refusal)
    require_tokenizer(tokenizer, config, training(chat_template_path=str(folder)))  # brings its tokens along


@pytest.mark.parametrize(
    ("alter", "changed", "vocabulary"),
    [
        (no_ending, {"eos_token": "<eos>"}, VOCABULARY),
        (lambda tokenizer: None, {}, VOCABULARY + 100),
        (lambda tokenizer: tokenizer.add_tokens(["w"]), {}, VOCABULARY + 1),
        (added(extra_special_tokens=["<image>"]), {}, VOCABULARY),
    ],
    ids=["named ending", "larger embedding", "word inside", "special token that may never occur"],
)
def test_a_tokenizer_that_fits_is_accepted(
    folder: Path, alter: Callable[[PreTrainedTokenizerBase], object], changed: dict[str, str], vocabulary: int
) -> None:
    tokenizer = tokenizer_of(folder, alter)
    require_tokenizer(tokenizer, LlamaConfig(vocab_size=vocabulary), training(**changed))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text()[:20])
    with pytest.raises(UserError, match=r"^cannot load the tokenizer of .*\(--model_name_or_path\): .*bring its files"):
        load_tokenizer(named(folder), training())


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"^cannot load the tokenizer of ") as refusal:
        load_tokenizer(named(folder), training())
    one_line(refusal)


@pytest.mark.parametrize("column", ["train_dataset", "eval_dataset"])
def test_a_row_with_a_token_that_the_model_lacks_is_refused(whole: Path, column: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    rows = {"train_dataset": [[1, 60], [2]], "eval_dataset": None}
    trainer: Any = SimpleNamespace(
        model=tiny_model(),
        processing_class=tokenizer,
        **{name: tokens and Dataset.from_dict({"input_ids": tokens}) for name, tokens in rows.items()},
    )
    require_known_tokens(trainer)
    setattr(trainer, column, Dataset.from_dict({"input_ids": [[1], [], [2, 61, 3]]}))
    with pytest.raises(UserError, match=r"has 62 tokens, but the model has an embedding of 61: token 61, '<image>'"):
        require_known_tokens(trainer)


@pytest.mark.parametrize("column", ["train_dataset", "eval_dataset"])
def test_a_row_longer_than_the_learnt_positions_is_refused(column: str) -> None:
    sizes = {"vocab_size": 61, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 4}
    rows = {length: Dataset.from_dict({"input_ids": [[1], [2] * length]}) for length in (4, 5)}
    for model in (GPT2LMHeadModel(GPT2Config(**sizes)), tiny_model()):
        trainer: Any = SimpleNamespace(model=model, train_dataset=rows[4], eval_dataset=None)
        require_known_positions(trainer)
        setattr(trainer, column, rows[5])
        if isinstance(model, GPT2LMHeadModel):
            with pytest.raises(UserError, match=r"a row has 5 tokens, .* positions for 4: set --max_length 4"):
                require_known_positions(trainer)
        else:
            require_known_positions(trainer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no such role') }}", "TemplateError: no such role"),
        ("{% for message in messages %}{{ message }", "TemplateSyntaxError: "),
        ("{{ messages[0].tool.name }}", "UndefinedError: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
    ],
    ids=["raises", "syntax", "undefined", "type"],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_chat_template_that_fails_is_refused(folder: Path, template: str, words: str, by_name: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = folder / "own.jinja"
    path.write_text(template)
    if not by_name:
        tokenizer.chat_template = template
    with pytest.raises(UserError) as refusal:
        require_chat_template(
            tokenizer,
            training(chat_template_path=str(path) if by_name else None),
            TALKS,
            Learning(),
        )
    assert f"fails on row 0 of the dataset, {words}" in one_line(refusal)
    assert "--chat_template_path" in str(refusal.value)


def test_a_chat_template_may_be_that_of_a_model(folder: Path, whole: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('not this one') }}"
    require_chat_template(tokenizer, training(chat_template_path=str(whole)), TALKS, Learning())


def test_a_chat_template_that_is_not_there_is_refused(whole: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read the chat template nowhere.jinja \(--chat_template_path\)"):
        require_chat_template(
            AutoTokenizer.from_pretrained(whole), training(chat_template_path="nowhere.jinja"), TALKS, Learning()
        )


def test_a_model_that_is_to_give_its_template_is_asked_for_before_the_rows_are_read(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    tokenizer, config = AutoTokenizer.from_pretrained(whole), LlamaConfig.from_pretrained(whole)
    with pytest.raises(UserError, match=r"^cannot read the chat template .* \(--chat_template_path\)"):
        require_tokenizer(tokenizer, config, training(chat_template_path=str(tmp_path)))


def test_an_attention_that_is_not_there_is_refused_by_its_name(whole: Path) -> None:
    for known in ("eager", "sdpa", "kernels-community/flash-attn", None):
        require_model(named(whole, attn_implementation=known), training())
    with pytest.raises(UserError, match=r"^no attention 'quick' \(--attn_implementation\): use eager, .*sdpa"):
        require_model(named(whole, attn_implementation="quick"), training())


@pytest.mark.parametrize(
    ("setting", "name", "given", "other"),
    [
        ("attn_implementation", "attn_implementation", "eager", "sdpa"),
        ("dtype", "dtype", "bfloat16", "float32"),
        ("dtype", "torch_dtype", "bfloat16", "float32"),
        ("model_revision", "revision", "v2", "v3"),
    ],
)
def test_model_init_kwargs_win_over_defaults_and_contradict_flags(
    folder: Path, setting: str, name: str, given: str, other: str
) -> None:
    model, arguments = named(folder), training(model_init_kwargs={name: given, "use_cache": False})
    agree_on_settings(model, arguments)
    assert getattr(model, setting) == given
    told = {"dtype": None, "revision": "main", "attn_implementation": None, "use_cache": False}
    assert init_kwargs(model, arguments) == told | {name.removeprefix("torch_"): given}

    agree_on_settings(named(folder, **{setting: given}), training(model_init_kwargs={name: given}))
    with pytest.raises(UserError, match=f"^--{setting} {other} and --model_init_kwargs .* {given} contradict"):
        agree_on_settings(named(folder, **{setting: other}), training(model_init_kwargs={name: given}))


def test_flags_alone_are_told_to_the_model(folder: Path) -> None:
    model, arguments = named(folder, attn_implementation="eager"), training()
    agree_on_settings(model, arguments)
    assert init_kwargs(model, arguments) == {"dtype": None, "revision": "main", "attn_implementation": "eager"}


def test_code_that_model_init_kwargs_trust_is_trusted_everywhere(folder: Path) -> None:
    arguments = training(model_init_kwargs={"trust_remote_code": True})
    agree_on_settings(named(folder), arguments)
    assert arguments.trust_remote_code


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([".*q_proj"], ".*q_proj"),
        (["model.layers...self_attn.q_proj"], "model.layers...self_attn.q_proj"),
        (["all-linear"], "all-linear"),
        (None, None),
    ],
)
def test_one_lora_target_is_a_name_unless_only_the_expression_fits(
    whole: Path, targets: list[str] | None, expected: object
) -> None:
    model = named(whole, use_peft=True, lora_target_modules=targets)
    config = LlamaConfig.from_pretrained(whole)
    settle_targets(model, config, blank_model(config))
    assert get_peft_config(model).target_modules == expected


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lora_target_modules": ["q_porj"]}, "no module 'q_porj' (--lora_target_modules); did you mean 'q_proj'?"),
        ({"lora_target_modules": ["q_proj", "v"]}, "no module 'v' (--lora_target_modules)"),
        ({"lora_target_modules": ["proj"]}, "no module 'proj' (--lora_target_modules)"),
        ({"lora_target_modules": ["*q_proj"]}, "no module '*q_proj' (--lora_target_modules); did you mean 'q_proj'?"),
        ({"lora_modules_to_save": ["head"]}, "no module 'head' (--lora_modules_to_save)"),
        (
            {"lora_target_parameters": ["experts.up"]},
            "the model has no parameter 'experts.up' (--lora_target_parameters): correct the name",
        ),
    ],
)
def test_a_lora_target_that_is_in_no_module_is_refused(whole: Path, changed: dict[str, Any], words: str) -> None:
    config = LlamaConfig.from_pretrained(whole)
    with pytest.raises(UserError) as refusal:
        settle_targets(named(whole, use_peft=True, **changed), config, blank_model(config))
    assert words in one_line(refusal)


def test_a_model_whose_lora_targets_nobody_knows_is_refused(whole: Path) -> None:
    config = LlamaConfig.from_pretrained(whole)
    config.model_type = "smollm3"
    with pytest.raises(UserError, match=r"which modules of a smollm3 model to adapt: name them \(--lora_target_mod"):
        settle_targets(named(whole, use_peft=True), config, None)


FROM_2 = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 2, "lora_dropout": 0.0}


def from_2(model: nn.Module) -> list[Block]:
    return taking_part(find_blocks(model), "layers", 2)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "opt", "qwen3_moe", "recurrent_gemma"])
def test_layers_that_never_train_get_no_adapters(family: str) -> None:
    """PEFT adapts the experts of a layer, which are parameters, and their router wherever they are."""
    model = tiny_decoder(family)
    model.config.architectures = [type(model).__name__]
    adapted = get_peft_model(model, adapter_of(ModelConfig(**FROM_2), model.config, from_2))
    in_layers = {name: re.search(r"\.(?:layers|h)\.(\d)\.", name) for name, _ in adapted.named_parameters()}
    layers = {layer[1] for name, layer in in_layers.items() if layer and "lora_" in name and ".mlp." not in name}
    in_mlps = {layer[1] for name, layer in in_layers.items() if layer and "lora_" in name and ".mlp." in name}
    assert layers == {"2"}
    assert in_mlps <= ({"0", "1", "2"} if family == "qwen3_moe" else {"2"})


def test_where_all_layers_take_part_all_get_adapters(whole: Path) -> None:
    config = LlamaConfig.from_pretrained(whole)
    assert adapter_of(named(whole, **FROM_2), config, find_blocks).exclude_modules is None


@pytest.mark.parametrize(
    "targets", ["model.layers.0.self_attn.q_proj", "model.layers.[01].*", ["layers.1.mlp.up_proj"]]
)
def test_adapters_for_layers_that_never_train_alone_are_refused(whole: Path, targets: list[str] | str) -> None:
    model = named(whole, **FROM_2 | {"lora_target_modules": targets})
    config = LlamaConfig.from_pretrained(whole)
    with pytest.raises(UserError, match="--lora_target_modules names nothing in the layers that take part"):
        adapter_of(model, config, from_2)


@pytest.mark.parametrize(
    ("of_model", "of_training", "words"),
    [
        ({}, {"use_liger_kernel": True}, "--use_liger_kernel needs liger-kernel: pip install liger-kernel"),
        ({"use_peft": True}, {}, "--use_peft needs peft: pip install peft"),
        ({"load_in_4bit": True}, {}, "--load_in_4bit needs bitsandbytes: pip install bitsandbytes"),
        ({"load_in_8bit": True}, {}, "--load_in_8bit needs bitsandbytes: pip install bitsandbytes"),
        ({}, {"model_init_kwargs": {"gguf_file": "model.gguf"}}, "needs gguf: pip install gguf"),
        (
            {"attn_implementation": "flash_attention_2"},
            {},
            "flash_attention_2 needs flash-attn: pip install flash-attn",
        ),
        ({}, {"report_to": ["tensorboard", "wandb"]}, "--report_to wandb needs wandb: pip install wandb"),
        ({}, {"report_to": "comet_ml"}, "--report_to comet_ml needs comet-ml: pip install comet-ml"),
    ],
)
def test_a_package_that_a_setting_needs_is_named(
    whole: Path, monkeypatch: pytest.MonkeyPatch, of_model: dict[str, Any], of_training: dict[str, Any], words: str
) -> None:
    model, arguments = named(whole, **of_model), training(**of_training)
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    require_packages(model, arguments)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    require_packages(named(whole), training())
    with pytest.raises(UserError) as refusal:
        require_packages(model, arguments)
    assert words in one_line(refusal)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"save_strategy": "no", "save_total_limit": 2}, 0),
        ({"save_strategy": "steps", "save_steps": 10}, 1),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": 1}, 2),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": 30}, 10),
        ({"save_strategy": "steps", "save_steps": 0.5, "save_total_limit": 3}, 2),
        ({"save_strategy": "epoch", "save_total_limit": 2}, 3),
        ({"save_strategy": "epoch", "save_total_limit": 9}, 4),
        ({"save_strategy": "best", "eval_strategy": "steps", "save_total_limit": 9, "metric_for_best_model": "x"}, 1),
    ],
)
def test_a_checkpoint_more_than_are_kept_needs_room(changed: dict[str, Any], expected: int) -> None:
    assert room.checkpoints_at_once(training(**changed), Steps(per_epoch=30, total=100)) == expected


def needed(monkeypatch: pytest.MonkeyPatch, run_folder: Path, model: Any, **changed: Any) -> int:
    """Bytes for which `require_room_for_run` asks."""
    asked: list[int] = []
    monkeypatch.setattr(room, "require_room", lambda folder, number: asked.append(number))
    of_run = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 1} | changed
    stage, blocks, merges = of_run.pop("stage", 2), of_run.pop("blocks", "layers"), of_run.pop("merges", False)
    arguments = training(output_dir=str(run_folder), **of_run)
    configuration: Any = SimpleNamespace(
        training=arguments,
        zero_stage=stage,
        blocks_of=lambda model: taking_part(find_blocks(model), blocks),
        output=SimpleNamespace(merge_adapter=merges),
        model=SimpleNamespace(dtype="float32"),
    )
    room.require_room_for_run(configuration, SimpleNamespace(model=model), Steps(per_epoch=30, total=100))
    return asked[0]


def test_a_run_needs_room_for_the_model_and_its_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model()
    everything = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert needed(monkeypatch, tmp_path, model, save_strategy="no") == 4 * everything
    assert needed(monkeypatch, tmp_path, model) == 4 * everything + 2 * (8 * everything + 12 * layers)
    assert needed(monkeypatch, tmp_path, model, blocks="all") == 4 * everything + 2 * 20 * everything
    assert needed(monkeypatch, tmp_path, model, stage=3) == 4 * everything + 2 * (4 * everything + 12 * layers)
    assert needed(monkeypatch, tmp_path, adapted_model(), save_strategy="no", merges=True) == 4 * everything + 4 * sum(
        weight.numel() for weight in adapted_model().parameters() if weight.requires_grad
    )
    assert needed(monkeypatch, tmp_path, model, bf16=True) == 2 * everything + 2 * (4 * everything + 12 * layers)
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert needed(monkeypatch, tmp_path, model) == 4 * everything + 8 * everything + 12 * layers


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    room.require_room(tmp_path, free // 2)
    with pytest.raises(UserError, match=r"^the run writes [\d.]+ GB to .*, [\d.]+ GB are free there") as refusal:
        room.require_room(tmp_path, free * 2)
    for setting in ("--output_dir", "--save_total_limit", "--save_strategy no"):
        assert setting in one_line(refusal)


@pytest.fixture(scope="module")
def runs(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run folders, and what their runs ended with."""
    folder = tmp_path_factory.mktemp("runs")
    model = shutil.copytree(whole, folder / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    rows = save_rows(folder / "rows.jsonl", 8)
    images = save_rows(folder / "images.jsonl", 8, row_5={"question": "w3 <image>"})
    eager = json.dumps({"attn_implementation": "eager"})
    adapted = {"use_peft": True, "merge_adapter": True, "learning_rate": 0.01, "max_steps": 4}
    every_block = adapted | {"method": "full", "select_fraction": None}
    more_tokens = {"lora_target_modules": "all-linear", "chat_template_path": folder / "more"}
    more_tokens |= {"dataset_name": save_talks(folder, tokenizer), "bf16": False}
    more_tokens |= dict.fromkeys(("prompt_field", "completion_field", "completion_template"))
    every_two_steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    every_two_steps |= {"eval_dataset": rows}
    changed = {
        "mended": {"save_strategy": "steps", "save_steps": 1, "model_init_kwargs": eager},
        "adapted": adapted | {"lora_target_modules": "q_proj", "model_revision": "second"},
        "adapted-3": adapted | {"lora_target_modules": "all-linear", "use_dora": True, "deepspeed": "zero3"},
        "from": {"select_fraction": 1.0, "select_from": 0.5},
        "adapted-from": adapted | {"lora_target_modules": "all-linear", "select_fraction": 1.0, "select_from": 0.5},
        "adapted-tied": every_block
        | {"lora_target_modules": "embed_tokens", "model_name_or_path": save_model(folder / "tied", tied=True)},
        "adapted-more": every_block | more_tokens,
        "tied-more": every_block | more_tokens | {"model_name_or_path": folder / "tied"},
        "best": {"load_best_model_at_end": True, "greater_is_better": True, "max_steps": 4} | every_two_steps,
        "beyond": {"select_from": 4},
        "long": {"max_steps": 3, "save_strategy": "steps", "save_steps": 1},
        "again": {
            **{"max_steps": 1, "output_dir": folder / "long"},
            "resume_from_checkpoint": folder / "long" / "checkpoint-1",
        },
        "from elsewhere": {"resume_from_checkpoint": folder / "best" / "checkpoint-2", "output_dir": folder / "long"},
        "around": {"use_peft": True, "lora_target_modules": "q_proj", "lora_modules_to_save": "lm_head"},
        "images": {"dataset_name": images},
        "pushed": {"push_to_hub": True},
        "pointer": {"model_name_or_path": folder},
        "misnamed": {"model_init_kwargs": json.dumps({"atention": "eager"})},
        "divided": {"model_init_kwargs": json.dumps({"tp_plan": "auto"})},
    }
    (folder / "config.json").write_text(POINTER)
    cases = {
        name: settings(model, rows, folder / name, **{"max_steps": 1} | values) for name, values in changed.items()
    }
    return folder, several_runs(folder, cases)


def save_talks(folder: Path, tokenizer: Any) -> Path:
    """Rows of messages, and in `more/` a tokenizer whose template ends them by a token that the model does not have."""
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"eos_token": "<|end|>"})
    more.chat_template = more.chat_template.replace("<eos>", "<|end|>")
    more.save_pretrained(folder / "more")
    turns = [[{"role": "user", "content": f"w{n} w4"}, {"role": "assistant", "content": f"w{n}"}] for n in range(3, 11)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return folder / "talks.jsonl"


def test_a_run_with_mended_generation_settings_exports_its_model(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = runs
    code, output, _ = outcomes["mended"]
    assert code == 0, output
    mended = "mended    generation settings of the model that have no effect are left out: temperature 0.6"
    assert output.count(mended) == 1
    LlamaForCausalLM.from_pretrained(folder / "mended" / "model")
    assert "temperature" not in (folder / "mended" / "model" / "generation_config.json").read_text()
    assert (folder / "mended" / "checkpoint-1" / "manifest.json").is_file()


def test_a_run_adapts_the_one_module_that_is_named(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = runs
    code, output, _ = outcomes["adapted"]
    assert code == 0, output
    written = json.loads((folder / "adapted" / "model" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj"]
    assert written["revision"] == "second", "of the base model, for whoever loads the adapter"
    poor = "note      over adapters AdaGradSelect has learnt less than LoRA"
    assert output.count(poor) == 1
    assert not any(poor in outcomes[name][1] for name in ("mended", "adapted-tied"))


@pytest.mark.parametrize("name", ["adapted", "adapted-3", "adapted-from"])
def test_the_merged_model_is_the_adapted_one(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, outcomes = runs
    code, output, _ = outcomes[name]
    assert code == 0, output
    assert f"{folder / name}: model/, merged/, " in output
    ids = torch.arange(20)[None]
    base, merged = (LlamaForCausalLM.from_pretrained(path) for path in (folder / "model", folder / name / "merged"))
    with torch.no_grad():
        of_base, of_merged = base(input_ids=ids).logits, merged(input_ids=ids).logits
        of_adapted = PeftModel.from_pretrained(base, folder / name / "model")(input_ids=ids).logits
    torch.testing.assert_close(of_merged, of_adapted, rtol=0, atol=1e-6)
    assert (of_merged - of_base).abs().max() > 1e-3
    AutoTokenizer.from_pretrained(folder / name / "merged")
    assert "- `merged`: the model with the adapter" in (folder / name / "README.md").read_text()


@pytest.mark.parametrize("name", ["adapted-tied", "adapted-more"])
def test_the_merged_model_has_its_own_head_and_new_tokens(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    """The embedding is adapted and the head, tied to it, is not; or both have rows for tokens of another template."""
    folder, outcomes = runs
    code, output, _ = outcomes[name]
    assert code == 0, output
    (adapted, tokenizer), (merged, _) = (load_model(str(folder / name / kind), "auto") for kind in ("model", "merged"))
    ids = torch.tensor([[3, 4, 5, len(tokenizer) - 1]])
    with torch.no_grad():
        of_adapted, of_merged = (model(input_ids=ids).logits for model in (adapted, merged))
        with adapted.disable_adapter():
            of_base = adapted(input_ids=ids).logits
    torch.testing.assert_close(of_merged, of_adapted, rtol=0, atol=1e-6)
    assert (of_merged - of_base).abs().max() > 1e-3


def test_a_run_from_a_layer_on_adapts_those_layers_alone(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = runs
    code, output, _ = outcomes["adapted-from"]
    assert code == 0, output
    adapter = load_file(folder / "adapted-from" / "model" / "adapter_model.safetensors")
    assert {name.partition(".layers.")[2].partition(".")[0] for name in adapter} == {"2", "3"}


def test_a_run_exports_the_best_checkpoint_and_says_so(runs: tuple[Path, dict[str, Any]]) -> None:
    """The highest loss, here, that of the first of two."""
    folder, outcomes = runs
    code, output, step = outcomes["best"]
    assert (code, step) == (0, 4), output
    assert output.count("best      the model is that of step 2 (--load_best_model_at_end)") == 1
    of_step = [load_file(folder / "best" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4)]
    exported = load_file(folder / "best" / "model" / "model.safetensors")
    same = [all(torch.equal(weight, exported[name]) for name, weight in of.items()) for of in of_step]
    assert same == [True, False]
    logged = [line for line in read_lines(folder / "best" / METRICS) if "eval_loss" in line]
    result = json.loads((folder / "best" / "result.json").read_text())
    assert result["eval_loss"] == logged[0]["eval_loss"] > logged[1]["eval_loss"]
    assert "| the model is that of step | 2 |" in (folder / "best" / "model" / "README.md").read_text()
    selected = [line["blocks"] for line in read_lines(folder / "best" / SELECTION)[1:]]
    written = json.loads((folder / "best" / "selection.json").read_text())
    assert written["steps"] == len(selected) == 4
    assert written["counts"] == {
        name: sum(index in blocks for blocks in selected) for index, name in enumerate(written["blocks"])
    }


def test_a_run_that_goes_on_from_an_older_checkpoint_leaves_the_later_ones_behind(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    folder, outcomes = runs
    code, output, step = outcomes["again"]
    assert (code, step) == (0, 1), output
    line = "aside     checkpoint-2, checkpoint-3: of what came after step 1 before, moved into abandoned-1/"
    assert output.count(line) == 1
    left = [path.name for path in sorted(folder.glob("long/**/checkpoint-*"))]
    assert left == ["checkpoint-2", "checkpoint-3", "checkpoint-1"]


def test_a_run_does_not_go_on_from_elsewhere_in_the_folder_of_another(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = runs
    code, output, _ = outcomes["from elsewhere"]
    assert code == 2, output
    assert f"{folder / 'long'} (--output_dir) holds checkpoint-1 of an earlier run: go on with that" in output


def test_a_run_from_a_layer_on_changes_those_layers_alone(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = runs
    code, output, _ = outcomes["from"]
    assert code == 0, output
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (folder / "model", folder / "from" / "model"))
    weights = after.state_dict()
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, weights[name])}
    assert changed == {name for name in weights if ".layers.2." in name or ".layers.3." in name}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("images", "embedding of 61: token 61, '<image>', is none of them"),
        ("pushed", "--push_to_hub cannot work offline"),
        ("pointer", "config.json is the pointer that Git LFS leaves"),
        ("beyond", "the model has layers 0 to 3: choose a lower one (--select_from)"),
        ("around", "head would not be trained"),
        ("tied-more", "a head tied to its embedding: name a template of tokens that the model has, or leave out"),
        ("misnamed", "--model_init_kwargs atention is nothing that the model takes"),
        ("divided", "--model_init_kwargs tp_plan divides the model in another way than DeepSpeed does"),
    ],
)
def test_a_run_that_would_fail_ends_at_its_start_in_one_line(
    runs: tuple[Path, dict[str, Any]], name: str, words: str
) -> None:
    code, output, _ = runs[1][name]
    assert code == 2, output
    assert [words in line for line in output.splitlines() if "agsel: error:" in line] == [True]
    assert "Traceback" not in output
