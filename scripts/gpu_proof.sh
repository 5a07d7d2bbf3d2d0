#!/usr/bin/env bash
# Prove and measure vlmslim on the GPU of this machine, and keep what was seen in benchmarks/CARD_DATE/.
#
#   scripts/gpu_proof.sh             runs every step, also after one that failed; exit status 1 if one did
#   scripts/gpu_proof.sh --dry-run   prints the commands and runs nothing
#   scripts/gpu_proof.sh --rehearse  runs them on a CPU, into a temporary folder, so that a mistake in a command shows
#                                    before a GPU is at hand: one decoder layer, one budget, one round, no flash
#                                    attention; the tests of the kernels are only collected
#
# It needs `pip install -e ".[dev]" flash-attn` and downloads nothing. Weights take up to 17 GiB, and batch 8 of the
# longest prompts takes about as much again. Exit status 2: it cannot start.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=prove
case "$#:${1:-}" in
  0:) ;;
  1:--dry-run | 1:--rehearse) mode=${1#--} ;;
  *)
    echo "gpu_proof.sh: unknown arguments $*; give --dry-run, --rehearse or nothing" >&2
    exit 2
    ;;
esac

device=cuda attentions=(sdpa flash_attention_2) collect=() small=() searches=()
folder=benchmarks/CARD_$(date +%F)
if [[ $mode == rehearse ]]; then
  device=cpu attentions=(sdpa) collect=(--collect-only -q)
  small=(--layers 1 --budgets 64 --image-size 336x336 --batch 1 --new-tokens 2 --repeats 1)
  searches=(--part searches --repeats 1)
  folder=$(mktemp -d)
elif [[ $mode == prove ]]; then
  if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_proof.sh: PyTorch sees no CUDA device here, so nothing was run; --dry-run prints the commands" >&2
    exit 2
  fi
  card=$(python -c 'from vlmslim.io.provenance import card; print(card("cuda"))') || exit 2
  folder=${folder/CARD/$card}
  mkdir -p benchmarks
  if ! mkdir "$folder"; then
    echo "gpu_proof.sh: $folder cannot be made; if it holds an earlier run of today, move it away" >&2
    exit 2
  fi
fi

failed=()
step() { # step LOG COMMAND...: print the command, run it, and keep its output in the folder
  local log=$folder/$1
  shift
  echo "$* > $log"
  [[ $mode == dry-run ]] && return
  "$@" 2>&1 | tee "$log" || failed+=("$log")
}

bench() { # bench SHAPE ARGUMENTS...
  step "$1.log" vlmslim bench --shape "$1" -m random -m divprune -m fastv -m todre --device "$device" \
    --dtype bfloat16 --attention sdpa --batch 1,8 --new-tokens 128 --repeats 20 --output "$folder" "${@:2}" "${small[@]}"
}

step kernels.log python -m pytest -m gpu tests "${collect[@]}"
for attention in "${attentions[@]}"; do
  for checkpoint in tiny-llava tiny-llava-next; do
    step "doctor-$checkpoint-$attention.log" vlmslim doctor "bundled/$checkpoint" --device "$device" --dtype bfloat16 \
      --attention "$attention"
  done
done
bench llava-1.5-7b --budgets 192,128,64
bench llava-next-7b --budgets 640,320,160 --image-size 672x672
bench qwen2.5-vl-7b --budgets 192,128,64
bench qwen3-vl-8b --budgets 192,128,64
step selection.log python scripts/bench_selection.py --device "$device" --output "$folder/selection" "${searches[@]}"

if ((${#failed[@]})); then
  echo "gpu_proof.sh: failed: ${failed[*]}" >&2
  exit 1
fi
