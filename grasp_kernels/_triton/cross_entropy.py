"""Softmax cross-entropy of rows of logits: the function of `reference`, as a kernel.

One program per row. The first pass keeps a running maximum and sum per lane and combines the lanes
at its end; the second pass overwrites the logits with the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels._triton.launch import config, launch


def softmax_loss(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    logits, targets = logits.contiguous(), targets.contiguous()
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    tile = config("cross_entropy", logits.device)
    launch(_softmax_loss, (rows,), tile, logits, targets, losses, width, GRADIENT=gradient)
    return losses, logits


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def _softmax_loss(
    logits, targets, losses, width, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row)
    known = (target >= 0) & (target < width)  # for other targets the loss is NaN
    at_target = tl.load(logits + target, known, other=float("nan")).to(tl.float32)

    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, width, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits + column, column < width, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, x)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # lanes that saw no logit yet
        total = total * tl.exp(peak - shift) + tl.exp(x - shift)
        peak = new_peak
    top = tl.max(peak, 0)
    norm = tl.sum(total * tl.exp(peak - top), 0)
    tl.store(losses + row, tl.log(norm) + (top - at_target))

    if GRADIENT:
        for start in range(0, width, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits + column, column < width, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top) / norm - (column == target.to(tl.int32)).to(tl.float32)
            tl.store(logits + column, p, column < width)
