"""Measure a model on held-out prompts; `agsel/evaluate.py` is what happens.

python launch/evaluate.py --model runs/demo/model --dataset runs/demo/data/two_step_heldout.jsonl \\
    --prompt_field question --completion_field answer --completion_template " {answer}" --output after.json
"""

from agsel.evaluate import main

if __name__ == "__main__":
    main()
