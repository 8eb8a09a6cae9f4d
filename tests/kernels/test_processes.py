"""Tests that need their own process: Triton's interpreter, and its compiler without a GPU.

Triton reads TRITON_INTERPRET when it is imported. The processes run in parallel, one per core.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import INTERPRETED, KERNELS_RUN

ROOT = Path(__file__).parents[2]
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
GATE = ["-m", "benchmarks.compile_gate"]
COMMANDS = {
    f"compile for sm_{chip}": [*GATE, "--chip", chip] for chip in ("80", "90")
} | {  # the others differ in the tiles of attention
    f"compile for sm_{chip}": [*GATE, "--chip", chip, "--only", "attention bf16 D=128"]
    for chip in ("86", "100", "120")
}
if not KERNELS_RUN:
    COMMANDS |= {
        f"interpret {path}": [*PYTEST, f"tests/kernels/{path}"]
        for path in (
            "on_device/test_attention.py",
            "on_device/test_cross_entropy.py",
            "on_device/test_projection.py",
            "on_device/test_scale.py",
            "on_device/test_swiglu.py",
            "test_behaviour.py",
        )
    }
if INTERPRETED:
    COMMANDS = {}


def run(name: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if name.startswith("interpret"):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *COMMANDS[name]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_process(name):
    pytest.importorskip("triton")
    done = run(name)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
