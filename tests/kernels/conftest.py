"""Collect kernel tests only where kernels can run: on a GPU, or in Triton's interpreter.

`on_device/` needs such a process. Without a GPU, `test_processes.py` starts one with
TRITON_INTERPRET=1.
"""

import os

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
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # the definition's backward would differ by run
    yield
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def sound_gpu(device):
    """A test that has broken the GPU for its process breaks no other: xdist starts a new one."""
    yield
    if device == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)
