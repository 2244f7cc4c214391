#!/usr/bin/env bash
# Students of equal size (within 0.5 %), each trained on equally many batches: study.sh stories260k|wikitext2 [SEED...]
# Run it from the project's folder; a run that is finished is not run again, one that was stopped goes on.
set -euo pipefail
data=$1
shift
case $data in
  stories260k)
    steps=600 replaced=4 size=169152 block='{hidden_size: 32, num_attention_heads: 4, intermediate_size: 64}' rows='{}' ;;
  wikitext2) # the teacher is trained by the recipe: rows of the validation split leave it the one of all arms
    steps=480 replaced=3 size=1334016 block='{hidden_size: 48, num_attention_heads: 4, intermediate_size: 144}'
    rows='{split: validation}' ;;
esac
iskd="name: iskd, num_replaced: $replaced, new_learning_rate: 1.0e-3, block: $block"
prune="name: layer_prune, num_removed: 2, calibration: $rows"
bi='importance: block_influence' no_repair='repair: {scope: none}'

run() { # arm, steps of a stage, method section, anything for a student that grows out of the teacher
  layerdistill train "recipes/causal_lm/$data.yaml" --set "method={$3}" --set "training.max_steps=$2" --set "seed=$seed" \
    --set "output=runs/$data/$1-$seed" ${4:+--set student=null}
}

for seed in "${@:-13}"; do
  run none "$steps" 'name: none'
  run kd "$steps" 'name: kd'
  run iskd $((steps / replaced - 50)) "$iskd, warmup_steps: 50" grows
  run iskd-task $((steps / replaced)) "$iskd, init: paper, weights: {task: 1, logits: 0, hidden: 0}" grows
  run layer_prune $((steps / 2)) "$prune" grows
  run layer_prune-all $((steps / 2)) "$prune, repair: {scope: all}" grows
  run layer_prune-bi $((steps / 2)) "$prune, $bi" grows
  run layer_prune-untrained $((steps / 2)) "$prune, $no_repair" grows
  run layer_prune-bi-untrained $((steps / 2)) "$prune, $bi, $no_repair" grows
  run l1_prune "$steps" "name: l1_prune, parameters: $size" grows
  run l1_prune-untrained "$steps" "name: l1_prune, parameters: $size, recovery: false" grows
done
