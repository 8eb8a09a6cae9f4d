"""Kernels run where there is a GPU, or in Triton's interpreter on CPU tensors.

`on_device/` is collected in a process that can run kernels. Without a GPU that is one started with
TRITON_INTERPRET=1, which `test_processes.py` does.
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
