#!/usr/bin/env bash
# Everything that needs a GPU, in parts, the most useful ones first; tools/README.md tells more.
#   tools/measure_gpu.sh [--only PART,...] [--out FOLDER] [--within SECONDS] [--archive FILE.tgz]
#                        [--small]
# A part has a time limit, a log and an exit code of its own, and none stops the others. Figures are
# lines of JSON, written as soon as they are known. A part that might end after --within SECONDS does
# not start; after each part, --archive holds all of FOLDER. --small runs all of it on a CPU, to try it out.
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/results/gpu only='' small='' within=86400 archive=''
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --within) within=$2; shift 2 ;;
    --archive) archive=$(realpath "$2"); shift 2 ;;
    --small) small=--small; shift ;;
    *) sed -n '2,7p' "$0" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(realpath "$out") || exit 2
python=${PYTHON:-python3} scratch=$(mktemp -d) failed=''
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

wanted() { case ",${only:-$1}," in *",$1,"*) ;; *) false ;; esac }
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 code=0 began=$SECONDS
  shift 2
  wanted "$name" || return 0
  [ -z "$small" ] || limit=$((3 * limit)) # of a busy CPU
  [ $((SECONDS + limit)) -le "$within" ] || { skip "$name" 'no time is left for it'; return 0; }
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null || code=$?
  printf '{"part": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$code" $((SECONDS - began)) "$limit" | tee -a "$out/parts.jsonl"
  [ "$code" = 0 ] || { failed="$failed $name"; tail -n 3 "$out/$name.log"; }
  [ -z "$archive" ] || tar czf "$archive" -C "$out" .
}
skip() { # NAME WHY
  wanted "$1" && echo "$1 is left out: $2" | tee "$out/$1.log"
}
op() { # NAME SECONDS: an op beside what else there is
  part "op-$1" "$2" "$python" -m benchmarks.kernels $small --op "$1" --models Llama-2-7B \
    --keep 1,0.5 --tested "$out/tests.xml" --out "$out/kernels.jsonl"
}
steps() { # NAME SECONDS OPTION...: steps of gate training with random weights
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m benchmarks.gate_training $small --keep 0.5 --repetitions 1 \
    --tested "$out/tests.xml" --log "$out/steps.jsonl" --out "$out/$name.json" "$@"
}

use_tiles() { # what `tune` has found in this call or an earlier one: all parts after it use it
  if [ -z "$small" ] && [ -s "$out/configurations.json" ]; then
    "$python" -m benchmarks.tune --install "$out/configurations.json"
  else
    false
  fi
}

use_tiles
parallel=() testing=540 again=300
if [ -n "$small" ]; then
  tests=(tests/kernels/test_reference.py -k 'swiglu or attention') tune=(--only attention_delta) case=tiny
  MODEL=$scratch/model TEXT=$scratch/text.txt EVAL_TEXT=$scratch/text.txt
  job=(--samples 4 --seq-len 32 --epochs 1 --eval-seq-len 64 --eval-windows 8 --device cpu)
  PYTHONPATH=tests:$PYTHONPATH "$python" - "$MODEL" "$TEXT" << 'END' || exit 2
import random, sys
from pathlib import Path
from families import save_tiny
save_tiny(Path(sys.argv[1]))
words = "the of a river stone light moves under every house she".split()
Path(sys.argv[2]).write_text(" ".join(random.choices(words, k=1500)))
END
else
  tests=(tests/kernels tests/test_gating.py tests/test_training.py)
  tests+=(--ignore tests/kernels/test_processes.py)
  if "$python" -c 'import xdist' 2> /dev/null; then parallel=(-n 12) testing=210 again=90; fi
  tune=(--seconds 100) case=llama-2-7b
  job=(--samples 512 --seq-len 512 --epochs 4 --eval-seq-len 1024)
fi

# ---- is it right, and how long does a step take?
part roofs 40 "$python" -m benchmarks.kernels $small --op roof --out "$out/kernels.jsonl"
if wanted tests; then rm -f "$out/tests.xml"; fi # one that is stopped leaves none
check=(env TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m pytest -q -p no:cacheprovider) # of each process
part tests "$testing" "${check[@]}" --junitxml "$out/tests.xml" \
  "${tests[@]}" "${parallel[@]}"
steps step-512x1 120 --models llama-2-7b --cases 512x1 --steps 20 --profile "$out/kernels-512x1.txt"
steps step-2048x4 120 --models llama-2-7b --cases 2048x4 --steps 6 \
  --profile "$out/kernels-2048x4.txt"

# ---- which tiles are the fastest, and how long do the ops take with them?
part tune 130 "$python" -m benchmarks.tune $small --out "$out/configurations.json" "${tune[@]}"
if wanted tune && use_tiles; then
  only='' part retests "$again" "${check[@]}" tests/kernels/on_device "${parallel[@]}"
  # without their tests, figures of these tiles are red
  tail -n 1 "$out/parts.jsonl" | grep -q '"retests", "exit": 0' || rm -f "$out/tests.xml"
fi
op swiglu 45
op ffn 60
op attention 60
op projection 40
op scale 40
op norm 40
op cross_entropy 40
op distillation 40
steps graph-off 60 --models llama-2-7b --cases 512x1,2048x1 --steps 10 --graph-tokens 0
steps graph-on 60 --models llama-2-7b --cases 512x1,2048x1 --steps 10

# ---- from text to checkpoint; faults that no test sees; other models, and less memory
if [ -n "${MODEL:-}" ] && [ -n "${TEXT:-}" ]; then
  part job 180 "$python" -m grasp prune "$MODEL" --as-published --keep 0.5 --calibration "$TEXT" \
    --eval-text "${EVAL_TEXT:-$TEXT}" --out "$scratch/pruned" "${job[@]}"
  for file in grasp.json log.jsonl; do
    if [ -e "$scratch/pruned/$file" ]; then cp "$scratch/pruned/$file" "$out/job-$file"; fi
  done
else
  skip job 'set MODEL and TEXT, and EVAL_TEXT'
fi
one_of_each='strides or many_blocks or halves or (test_ffn and random and None) or heads_around'
one_of_each+=' or sdpa_composition or test_chunks or rows_of_a_program'
for tool in memcheck racecheck; do
  if command -v compute-sanitizer > /dev/null && [ -z "$small" ]; then
    part "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --report-api-errors no --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
      tests/kernels/on_device -k "$one_of_each"
  else
    skip "$tool" 'it needs a GPU and compute-sanitizer'
  fi
done
steps balanced 90 --models llama-2-7b --cases 512x1,2048x4 --steps 4 --memory balanced
steps 8b 150 --models llama-3.1-8b,qwen3-8b --cases 512x1,2048x4 --steps 4
steps long 90 --models llama-3.1-8b --cases 8192x1 --steps 4
part one-rank 150 "$python" -m benchmarks.ranks --case "$case" --ranks 1 --shard full --rounds 2 \
  --out "$out/one-rank.json"

[ -z "$failed" ] || { echo "failed or over their time:$failed"; exit 1; }
