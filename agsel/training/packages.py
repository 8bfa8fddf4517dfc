"""Packages that only some settings need."""

from __future__ import annotations

from importlib.util import find_spec

from trl import ModelConfig, SFTConfig

from agsel.errors import UserError

_SAME_NAMES = ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb")
FLASH = "flash_attn", "flash-attn"
REPORTERS = {name: (name, name) for name in _SAME_NAMES} | {
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
}
"""Module and distribution by what `--report_to` says, for those that agsel does not bring."""


def require_packages(model: ModelConfig, training: SFTConfig) -> None:
    """Refuse settings that need a package which is not installed.

    Raises:
        UserError: names the setting, and how to install the package.
    """
    needed = [
        (training.use_liger_kernel, "--use_liger_kernel", "liger_kernel", "liger-kernel"),
        (model.use_peft, "--use_peft", "peft", "peft"),
        (model.load_in_4bit, "--load_in_4bit", "bitsandbytes", "bitsandbytes"),
        (model.load_in_8bit, "--load_in_8bit", "bitsandbytes", "bitsandbytes"),
        ("gguf_file" in (training.model_init_kwargs or {}), "gguf_file in --model_init_kwargs", "gguf", "gguf"),
        (model.attn_implementation == "flash_attention_2", "--attn_implementation flash_attention_2", *FLASH),
        *((True, f"--report_to {name}", *REPORTERS[name]) for name in training.report_to if name in REPORTERS),
    ]
    for is_set, setting, module, distribution in needed:
        if is_set and find_spec(module) is None:
            raise UserError(f"{setting} needs {distribution}: pip install {distribution}, or leave it out")
