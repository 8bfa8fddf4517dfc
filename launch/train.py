"""Fine-tune a language model, updating only a few of its blocks at each step; `agsel/train.py` is what happens.

deepspeed --num_gpus 4 launch/train.py --config launch/recipes/qwen2.5-0.5b-gsm8k.yaml --method adagradselect
"""

from agsel.train import command

if __name__ == "__main__":
    command()
