import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("chip", ["80", "90"])
def test_every_kernel_compiles_within_the_chip(chip):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_gate", "--chip", chip],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
