#!/usr/bin/env bash
# A tiny Llama learns two-step arithmetic, three of its six layers at a time: a whole fine-tuning run without a GPU or a
# model hub. On two cores it takes 5 minutes with the installation, for which it needs Python and pip, and then 3.
#   bash tools/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
export HF_HUB_OFFLINE=1

run=runs/demo
recipe=launch/recipes/demo.yaml
columns=(--prompt_field question --completion_field answer --completion_template ' {answer}')

demo() {
  mkdir -p $run/logs
  if [ ! -f $run/pretrained/complete ]; then
    step data "Data and an untrained model" python tools/arithmetic.py --output $run
    pretrain
    touch $run/pretrained/complete
  fi
  if [ ! $run/after.json -nt $recipe ] || [ ! $run/after.json -nt $run/pretrained/complete ]; then
    evaluate before $run/pretrained/model
    rm -rf $run/model # of an earlier recipe
    train finetune "Fine-tuning on two-step problems" --config $recipe
    evaluate after $run/model
  fi
  report
  echo "To fine-tune again, edit $recipe; to start from nothing, rm -r $run; then bash tools/demo.sh"
}

pretrain() {
  rm -rf $run/pretrained # of a demo that was interrupted
  train pretrain "Pre-training on one-step problems" --method full --output_dir $run/pretrained \
    --model_name_or_path $run/base --dataset_name $run/data/one_step_train.jsonl "${columns[@]}" \
    --max_steps 500 --per_device_train_batch_size 32 --learning_rate 7e-3 --warmup_steps 50 --adam_beta2 0.98 \
    --bf16 false --gradient_checkpointing false --save_strategy no --logging_steps 100
}

# train LOG TITLE ARGUMENTS...: 64 examples a step on two GPUs or one; without any, on two processes of one CPU thread.
train() {
  local log=$1 title=$2 gpus port
  shift 2
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  port=$(python -c 'import socket; probe = socket.socket(); probe.bind(("", 0)); print(probe.getsockname()[1])')
  [ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  [ "$gpus" != 1 ] || set -- "$@" --gradient_accumulation_steps 2
  step "$log" "$title" deepspeed --num_gpus $((gpus == 1 ? 1 : 2)) --master_port "$port" launch/train.py "$@"
}

# evaluate NAME MODEL: results go to NAME.json
evaluate() {
  step "$1" "Held-out two-step problems, $1 fine-tuning" \
    python launch/evaluate.py --model "$2" --dataset $run/data/two_step_heldout.jsonl "${columns[@]}" \
    --output $run/"$1".json --batch_size 128 --max_new_tokens 24
}

# step LOG TITLE COMMAND...: say what is done and show the lines worth reading; everything goes to logs/LOG.log
step() {
  local log=$run/logs/$1.log title=$2 start=$SECONDS shown='^(engine|model|blocks|frozen|batch|steps?|nll|accuracy) '
  shift 2
  printf '\n%s\n$%s\n' "$title" "$(printf ' %q' "$@")"
  "$@" 2>&1 | tee "$log" | { grep --line-buffered -E "$shown" || true; } ||
    { tail -n 30 "$log"; echo "failed: the whole output is in $log"; exit 1; }
  echo "($((SECONDS - start)) s)"
}

report() {
  python - $run <<'PYTHON'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
before, after, selection = (json.loads((run / f"{name}.json").read_text()) for name in ("before", "after", "selection"))
print(f"\nHeld-out accuracy   {before['accuracy']:.1%} before, {after['accuracy']:.1%} after, {after['rows']} problems")
print(f"Answer NLL          {before['nll']:.3f} before, {after['nll']:.3f} after\n")
untrained, trained = (json.loads((run / f"{name}.jsonl").read_text().split("\n")[0]) for name in ("before", "after"))
print(f"Asked      {trained['prompt']}\nBefore    {untrained['generated']}\nAfter     {trained['generated']}\n")
print(f"Steps in which each block was trained, of {selection['steps']}")
for block, count in selection["counts"].items():
    print(f"  {block:10}{count:5}  {'#' * round(40 * count / selection['steps'])}")
print(f"\n{run}/model/         the fine-tuned model, an ordinary Hugging Face folder")
print(f"{run}/tensorboard/   tensorboard --logdir {run}/tensorboard")
print(f"{run}/logs/          the whole output of every step")
PYTHON
}

demo
