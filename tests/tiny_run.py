"""Everything that a run of `launch/train.py` needs, made on the spot: a tiny model folder and a few rows of data."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY, tiny_model

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(VOCABULARY - 3))]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w0 {% generation %}{{ message['content'] }} "
    "<eos>{% endgeneration %} {% else %}w1 {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w0 {% endif %}"
)


def save_model(folder: Path, *, tied: bool = False, layers: int = 4) -> Path:
    """An ordinary Hugging Face folder with a randomly initialised Llama and a word-level tokenizer."""
    tiny_model(layers=layers, tied=tied).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path: Path, number: int = 32, **changed: dict[str, object]) -> Path:
    """JSON Lines with `question` and `answer` of ragged lengths; the answer repeats words of the question.

    Args:
        path: file to write.
        number: rows.
        changed: `row_3={"answer": ""}` overrides fields of a row.
    """
    draw = random.Random(0)
    rows = []
    for index in range(number):
        question = [draw.choice(WORDS[3:]) for _ in range(draw.randint(2, 9))]
        row = {"question": " ".join(question), "answer": " ".join(question[: draw.randint(1, len(question))])}
        rows.append(row | changed.get(f"row_{index}", {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Path, data: Path, output: Path, **changed: object) -> list[str]:
    """Command line of a short fp32 run of `launch/train.py`.

    Args:
        model: model folder.
        data: rows with `question` and `answer`.
        output: run folder.
        changed: further settings; None leaves one out.
    """
    chosen: dict[str, object] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output,
        "prompt_field": "question",
        "completion_field": "answer",
        "completion_template": " {answer}",
        "bf16": "false",
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "select_fraction": 0.5,
    } | changed
    return [text for name, value in chosen.items() if value is not None for text in (f"--{name}", str(value))]
