"""Choose the implementation for a tensor: Triton on CUDA (or in its interpreter), else PyTorch."""

import importlib
import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does


def runs_triton(x: Tensor) -> bool:
    device_fits = x.is_cuda or (x.device.type == "cpu" and _INTERPRETED)
    return device_fits and x.dtype != torch.float64 and _HAS_TRITON


def kernels(op: str) -> ModuleType:
    """Return a module of `_triton`, imported on first use."""
    return importlib.import_module(f"grasp_kernels._triton.{op}")
