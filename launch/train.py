"""Fine-tune a language model, updating only a few of its blocks at each step; `agsel/train.py` is what happens.

deepspeed --num_gpus 4 launch/train.py --config launch/recipes/qwen2.5-0.5b-gsm8k.yaml --method adagradselect
"""

import gc

gc.disable()  # while so much is imported that stays: a fifth of the time would be spent in looking for garbage

from agsel.train import command  # noqa: E402

if __name__ == "__main__":
    command()
