"""What the kernels on rows of channels share: their inputs, and their sums over tokens."""

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[T, F] with a unit stride along F, copied only where it has another."""
    return x if x.stride(1) == 1 else x.contiguous()


def partials(blocks: int, width: int, like: Tensor) -> Tensor:
    """fp32 [blocks, width] on the device of `like`: the sums over each block of rows."""
    return like.new_empty(blocks, width, dtype=torch.float32)
