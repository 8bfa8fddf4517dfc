#!/usr/bin/env bash
# A tiny Llama learns two-step arithmetic, three of its six layers at a time: the whole way of a fine-tuning run in
# about three minutes on two cores, without a GPU or a model hub. Sets everything up on a machine with Python and pip.
#   bash tools/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh

demo=runs/demo
recipe=launch/recipes/demo.yaml
columns=(--prompt_field question --completion_field answer --completion_template " {answer}")

main() {
  mkdir -p "$demo/logs"
  choose_device
  if [ ! -d $demo/pretrained/model ]; then
    quietly "data and an untrained model" data python tools/arithmetic.py --output $demo
    quietly "pre-training on one-step problems, all layers, $ranks rank(s)" pretrain pretrain
  fi
  if [ ! $demo/after.json -nt $recipe ] || [ ! $demo/after.json -nt $demo/pretrained/model/config.json ]; then
    quietly "evaluation on two-step problems" before evaluate $demo/pretrained/model $demo/before.json
    quietly "fine-tuning on two-step problems, $recipe" finetune train --config $recipe
    quietly "evaluation again" after evaluate $demo/model $demo/after.json
  fi
  report
}

# Two GPUs or one; without any, two processes on the CPU, of one thread each.
choose_device() {
  local gpus
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  ranks=$((gpus == 1 ? 1 : 2))
  if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  fi
}

# quietly WHAT LOG COMMAND...: say what runs and for how long; its output goes to a log, shown only if it fails.
quietly() {
  local what=$1 log=$demo/logs/$2.log start=$SECONDS
  shift 2
  printf '%-72s' "$what"
  "$@" >"$log" 2>&1 || { printf 'failed\n'; tail -n 30 "$log"; exit 1; }
  printf '%4d s\n' $((SECONDS - start))
}

train() { deepspeed --num_gpus "$ranks" --master_port "${MASTER_PORT:-29513}" launch/train.py "$@"; }

pretrain() {
  train --method full --model_name_or_path $demo/base --dataset_name $demo/data/one_step_train.jsonl "${columns[@]}" \
    --output_dir $demo/pretrained --max_steps 600 --learning_rate 7e-3 --warmup_steps 50 --adam_beta2 0.98 \
    --per_device_train_batch_size $((64 / ranks)) --bf16 false --gradient_checkpointing false \
    --save_strategy no --logging_steps 50
}

evaluate() {
  python launch/evaluate.py --model "$1" --output "$2" --dataset $demo/data/two_step_heldout.jsonl "${columns[@]}" \
    --batch_size 128 --max_new_tokens 24
}

report() {
  python - $demo <<'PYTHON'
