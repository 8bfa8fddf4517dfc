"""The trained model as an ordinary Hugging Face folder, from any ZeRO stage."""

from pathlib import Path

from transformers import PreTrainedModel, Trainer


def export_model(trainer: Trainer, folder: Path) -> None:
    """Write weights, configuration and tokenizer; a PEFT model's adapter alone. Every rank must call it.

    Unlike `Trainer.save_model`, a head that is tied to the embedding is not written a second time: at stages 1 and 2
    accelerate clones every tensor, after which nobody can see that the two were one.

    Args:
        trainer: after training.
        folder: `from_pretrained` loads it.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # at stage 3 gathered by all ranks
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PreTrainedModel):
        weights = {name: tensor for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(folder, state_dict=weights)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
