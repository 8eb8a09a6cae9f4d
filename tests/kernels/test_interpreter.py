"""Run the kernels' tests, and the ops' behaviour on top of them, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KERNELS_RUN

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("on_device/test_*.py")), HERE / "test_behaviour.py"]


@pytest.mark.skipif(KERNELS_RUN, reason="the kernels run in this process")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
