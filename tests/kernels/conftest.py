"""Collect kernel tests only where kernels can run: on a GPU, or in Triton's interpreter.

`on_device/` needs such a process. Without a GPU, `test_processes.py` starts one with
TRITON_INTERPRET=1.
"""

import pytest
import torch
from oracle import INTERPRETED, KERNELS_RUN

collect_ignore = [] if KERNELS_RUN else ["on_device"]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def poison():
    """Memory of torch.empty holds NaN (integers: their maximum), so unwritten outputs fail."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
