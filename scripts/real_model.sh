#!/bin/bash
# All runs of docs/real_model.md, one after the other, each from where it ended:
#
#   scripts/real_model.sh MODEL CORPUS QUESTIONS RUNS
#
# MODEL: SmolLM2-135M-Instruct as a Hugging Face folder. CORPUS, QUESTIONS: what question_sets.py
# reads. RUNS: a folder outside the checkout, with 20 GB free; table and curve are made in
# RUNS/figures. Stop it with Ctrl-C (a kill of the script leaves what it has started), and start it
# again: GRPO and evaluations go on, the cold start and the imitation begin anew. RUNS/sets is made
# once: take another RUNS for other questions. STOP_AFTER=cold (grpo_0, ...) ends it after that run
# and its evaluations.
set -euo pipefail
if [ $# != 4 ] || [ ! -f "$1/config.json" ] || [ ! -f "$2" ] || [ ! -f "$3" ]; then
  echo "usage: $0 MODEL CORPUS QUESTIONS RUNS (a model's folder, two files, a folder)" >&2
  exit 2
fi
model=$(realpath "$1") corpus=$(realpath "$2") questions=$(realpath "$3") runs=$(realpath -m "$4")
cd "$(dirname "$0")/.."
mkdir -p "$runs"
export OMP_WAIT_POLICY=passive # on shared cores waiting threads would take time from working ones
python=${PYTHON:-python}
world=("--corpus=$runs/sets/corpus.jsonl" --system_prompt_file=prompts/wiki.txt)
data=("${world[@]}" "--data=$runs/sets/train.jsonl" "--eval_data=$runs/sets/held_out.jsonl")

examine() { # FOLDER of a run or of a model: greedy, and two samples of each question
  for way in greedy sampled; do
    options=(--eval_temperature=0)
    if [ $way = sampled ]; then options=(--eval_temperature=1 --repeats=2); fi
    if [ -f "$1/$way/summary.json" ]; then continue; fi
    if [ -f "$1/$way/config.yaml" ]; then
      $python eval.py "--resume=$1/$way"
    else
      $python eval.py --search=local "--model=$1" "--data=$runs/sets/held_out.jsonl" "${world[@]}" \
        "${options[@]}" "--run_dir=$1/$way"
    fi
  done
  if [ "$(basename "$1")" = "${STOP_AFTER:-}" ]; then exit; fi
}

learn() { # NAME SEED MORE...: GRPO
  folder=$runs/$1
  if [ -f "$folder/config.yaml" ]; then
    if [ ! -f "$folder/summary.json" ]; then $python train.py "--resume=$folder"; fi
  else
    $python train.py --preset=wiki "--model=$runs/cold" "${data[@]}" "--seed=$2" \
      "--run_dir=$folder" "${@:3}"
  fi
  examine "$folder"
}

if [ ! -f "$runs/sets/held_out.jsonl" ]; then
  $python -m scripts.question_sets --short_addresses --held_out=.4 "--out=$runs/sets" \
    "$corpus" "$questions"
fi
if ! grep -q finished "$runs/cold/cold_start.jsonl" 2> /dev/null; then
  $python -m scripts.cold_start "--model=$model" "${data[@]}" --reading_steps=50 --steps=80 \
    --questions_per_step=4 --group_size=2 --lr=3e-4 --lr_warmup=4 --lr_decay=yes \
    "--run_dir=$runs/cold"
fi
examine "$runs/cold"
for seed in 0 1 2; do learn grpo_$seed $seed; done
learn shuffled_0 0 --shuffle_rewards=yes
# As many demonstrations and updates as a run of GRPO has trajectories and updates, at its rate.
if ! grep -q finished "$runs/imitation_0/metrics.jsonl" 2> /dev/null; then
  $python -m scripts.cold_start "--model=$runs/cold" "${data[@]}" --reading_steps=0 \
    --reading_share=0 --made_up=0 --log=metrics.jsonl "--run_dir=$runs/imitation_0"
fi
examine "$runs/imitation_0"
$python -m scripts.real_model collect "--out=$runs/figures/runs" \
  "--questions=$runs/sets/held_out.jsonl" \
  "$runs"/{cold,grpo_0,grpo_1,grpo_2,shuffled_0,imitation_0}
$python -m scripts.real_model draw "$runs/figures/runs"
