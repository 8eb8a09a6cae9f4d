"""Shared by the kernels on rows of channels: their inputs, and their sums over tokens."""

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """Return [T, F] with a unit stride along F; copy only if needed."""
    return x if x.stride(1) == 1 else x.contiguous()


def partials(blocks: int, width: int, like: Tensor) -> Tensor:
    """Allocate fp32 [blocks, width] on the device of `like` for sums over each block of rows."""
    return like.new_empty(blocks, width, dtype=torch.float32)
