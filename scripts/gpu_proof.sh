#!/usr/bin/env bash
# Prove and measure vlmslim on the GPU of this machine, and keep what was seen in benchmarks/CARD_DATE/.
#
#   scripts/gpu_proof.sh             runs every step, also after one that failed; exit status 1 if one did. Give the
#                                    same command again after a stop: steps that are done are not repeated
#   scripts/gpu_proof.sh --dry-run   prints the commands and runs nothing
#   scripts/gpu_proof.sh --rehearse  runs them on a CPU in a few minutes, into a temporary folder, so that a mistake in a
#                                    command shows before a GPU is at hand: bundled checkpoints instead of LLaVA's
#                                    shapes, three decoder layers of the others, small pictures, one budget, one round, two
#                                    methods in the doctor, no flash attention; tests of the kernels are only collected
#
# It needs `pip install -e ".[dev]" flash-attn` and downloads nothing. Weights take up to 17 GiB, and batch 8 of the
# longest prompts takes about as much again. Exit status 2: it cannot start.
set -uo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT TERM # a step that Ctrl-C ends must not lead to the next one

mode=prove
case "$#:${1:-}" in
  0:) ;;
  1:--dry-run | 1:--rehearse) mode=${1#--} ;;
  *)
    echo "gpu_proof.sh: unknown arguments $*; give --dry-run, --rehearse or nothing" >&2
    exit 2
    ;;
esac

device=cuda attentions=(sdpa flash_attention_2) collect=() few=() searches=() targets=()
folder=benchmarks/CARD_$(date +%F)
if [[ $mode == rehearse ]]; then
  device=cpu attentions=(sdpa) collect=(--collect-only -q) few=(-m divprune -m fastv)
  searches=(--part searches --repeats 1 --no-targets) targets=(--no-targets)
  folder=$(mktemp -d)
elif [[ $mode == prove ]]; then
  if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_proof.sh: PyTorch sees no CUDA device here, so nothing was run; --dry-run prints the commands" >&2
    exit 2
  fi
  if ! python -c 'import flash_attn'; then
    echo "gpu_proof.sh: flash attention is missing, so nothing was run; pip install flash-attn" >&2
    exit 2
  fi
  card=$(python -c 'from vlmslim.io.provenance import card; print(card("cuda"))') || exit 2
  folder=${folder/CARD/$card}
  mkdir -p "$folder" || exit 2
fi

failed=()
step() { # step NAME COMMAND...: print the command, run it, and keep its output in NAME.log, or NAME.failed if it fails
  local name=$folder/$1
  shift
  if [[ -e $name.log ]]; then
    echo "done already: $name.log"
    return
  fi
  echo "$* > $name.log"
  [[ $mode == dry-run ]] && return
  if "$@" 2>&1 | tee "$name.failed"; then
    mv "$name.failed" "$name.log"
  else
    failed+=("$name.failed")
  fi
}

bench() { # bench SHAPE ARGUMENTS...
  local subject=(--shape "$1") small=()
  if [[ $mode == rehearse ]]; then
    case $1 in
      llava-1.5-7b) subject=(bundled/tiny-llava) ;;
      llava-next-7b) subject=(bundled/tiny-llava-next) ;;
      *) subject+=(--layers 3) ;;
    esac
    small=(--budgets 4 --image-size 112x112 --batch 1 --new-tokens 2 --repeats 1)
  fi
  step "$1" vlmslim bench "${subject[@]}" -m random -m divprune -m fastv -m todre --device "$device" --dtype bfloat16 \
    --attention sdpa --batch 1,8 --new-tokens 128 --repeats 20 --output "$folder" "${@:2}" "${small[@]}"
}

step kernels python -m pytest -m gpu tests "${collect[@]}"
for attention in "${attentions[@]}"; do
  for checkpoint in tiny-llava tiny-llava-next; do
    step "doctor-$checkpoint-$attention" vlmslim doctor "bundled/$checkpoint" "${few[@]}" --device "$device" \
      --dtype bfloat16 --attention "$attention"
  done
done
bench llava-1.5-7b --budgets 192,128,64
bench llava-next-7b --budgets 640,320,160 --image-size 672x672
bench qwen2.5-vl-7b --budgets 192,128,64
bench qwen3-vl-8b --budgets 192,128,64
step selection python scripts/bench_selection.py --device "$device" --output "$folder/selection" "${searches[@]}"
step targets python scripts/gpu_targets.py "$folder" "${targets[@]}"

if ((${#failed[@]})); then
  echo "gpu_proof.sh: failed: ${failed[*]}" >&2
  exit 1
fi
