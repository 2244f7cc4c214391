#!/usr/bin/env bash
# Five ways to choose teacher layers beside none and kd, from three starts, on STS-B: layer_selection.sh [SEED...]
# Run it from the project's folder; what is finished is not run again.
set -euo pipefail

run() { # student's start, arm, method section
  local student=(--set "student={num_blocks: 3, hidden_size: 192, init: $1}")
  if [ "$1" = copy ]; then # whole blocks, which stay close to where they are
    student=(--set "student={num_blocks: 3, init: copy}" --set training.learning_rate=1e-4)
  fi
  layerdistill train recipes/glue/stsb.yaml --set "method={$3}" --set "seed=$seed" \
    "${student[@]}" --set "output=runs/selection/$1/$2-$seed"
}

for seed in "${@:-13}"; do
  for start in copy truncate random; do
    run "$start" none 'name: none'
    run "$start" kd 'name: kd'
    for map in forward reverse all_to_one random in_order_random; do
      run "$start" "$map" "name: ild, layer_map: $map"
    done
  done
done
