"""Full fine-tuning as TRL's users write it: the script that `tools/bench/start.py` compares `launch/train.py` with."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser


def main() -> None:
    """Train as the command line says."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_arguments, training_arguments, model_arguments = parser.parse_args_and_config()
    model = AutoModelForCausalLM.from_pretrained(model_arguments.model_name_or_path, dtype=model_arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path)
    rows = load_dataset("json", data_files=script_arguments.dataset_name, split="train")
    trainer = SFTTrainer(model, args=training_arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()


if __name__ == "__main__":
    main()
