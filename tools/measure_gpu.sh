#!/usr/bin/env bash
# All that needs a GPU, in one command: correctness first, then the kernels, then a step of learning.
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
python -m pytest tests/kernels
if command -v compute-sanitizer > /dev/null; then
  compute-sanitizer --error-exitcode 1 python -m pytest tests/kernels/on_device \
    -k "random or strides or many_blocks"
fi
python -m benchmarks.kernels --out "$out/$device.json"
python -m benchmarks.gate_step --device cuda --seq-len 512 --steps 20 --out "$out/gate_step_$device.json"
