#!/usr/bin/env bash
# Seven methods over GLUE's small tasks, one start, one budget, one learning rate: study.sh 192|384 TASK [SEED...]
# TASK is rte, mrpc, cola or stsb. Run it from the project's folder; what is finished is not run again.
set -euo pipefail
width=$1 task=$2
shift 2
shape=()
if [ "$width" = 384 ]; then shape=(--set 'student={num_blocks: 3, init: copy}' --set training.learning_rate=1e-4); fi
even='temperature: 2.0, weights: {task: 1, logits: 1, hidden: 1}'

run() { # arm, method section, more
  layerdistill train "recipes/glue/$task.yaml" --set "method={$2}" --set "seed=$seed" \
    --set "output=runs/glue-$width/$task/$1-$seed" "${shape[@]}" "${@:3}"
}

for seed in "${@:-13}"; do
  run none 'name: none'
  run kd 'name: kd'
  run ild 'name: ild'
  run cka 'name: cka'
  run rail_kd "name: rail_kd, $even"
  run lora_ild "name: lora_ild, teacher_adapters: svd, $even"
  # One epoch on the labels and two of distillation: no more passes than the others have; the filters' one is besides.
  run ted 'name: ted, student_finetune: {num_train_epochs: 1}, stage_one: {num_train_epochs: 1}' \
    --set training.num_train_epochs=2
done
