#!/usr/bin/env bash
# All that needs a GPU, in one command: correctness first, then the kernels, then gate training.
# Meant for ten minutes on one H100 with torch 2.11 and Triton 3.6; written without one at hand.
#   tools/measure_gpu.sh [FOLDER]      results go to FOLDER, benchmarks/results by default
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
device=$(python - <<'EOF'
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU: run this where one is")
print(torch.cuda.get_device_name().lower().replace(" ", "-"))
EOF
)
mkdir -p "$out"
# without what needs no GPU
python -m pytest tests/kernels tests/test_training.py tests/test_gating.py \
  --ignore tests/kernels/test_processes.py
if command -v compute-sanitizer > /dev/null; then
  compute-sanitizer --error-exitcode 1 python -m pytest tests/kernels/on_device \
    -k "random or strides or many_blocks"
fi
python -m benchmarks.kernels --out "$out/$device.json"
python -m benchmarks.gate_training --models llama-2-7b --out "$out/gate_training_$device.json"
python -m benchmarks.gate_training --models llama-3.1-8b,qwen3-8b --cases 512x1,2048x8 --keep 0.5 \
  --steps 10 --repetitions 1 --out "$out/gate_training_8b_$device.json"
