"""Losses of rows of logits: the functions of `reference`, as kernels.

One program per row. The first pass over a row keeps a running maximum and sum per lane and combines
the lanes at its end; the last pass overwrites the logits with the gradient.
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


def distillation_loss(
    logits: Tensor, taught: Tensor, targets: Tensor, hard: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    logits, taught, targets = logits.contiguous(), taught.contiguous(), targets.contiguous()
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    tile = config("cross_entropy", logits.device)
    arguments = logits, taught, targets, losses, width, hard
    launch(_distillation_loss, (rows,), tile, *arguments, GRADIENT=gradient)
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

    top, norm = _softmax_terms(logits, width, BLOCK_V)
    tl.store(losses + row, tl.log(norm) + (top - at_target))

    if GRADIENT:
        for start in range(0, width, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits + column, column < width, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top) / norm - (column == target.to(tl.int32)).to(tl.float32)
            tl.store(logits + column, p, column < width)


@triton.jit
def _distillation_loss(
    logits, taught, targets, losses, width, hard, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    taught += row * width
    target = tl.load(targets + row)
    known = (target >= 0) & (target < width)  # for other targets the loss is NaN
    at_target = tl.load(logits + target, known, other=float("nan")).to(tl.float32)

    top, norm = _softmax_terms(logits, width, BLOCK_V)
    taught_top, taught_norm = _softmax_terms(taught, width, BLOCK_V)
    log_norm, log_taught_norm = tl.log(norm), tl.log(taught_norm)
    apart = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, width, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits + column, column < width, other=float("-inf")).to(tl.float32)
        y = tl.load(taught + column, column < width, other=float("-inf")).to(tl.float32)
        own = (x - top) - log_norm  # log_norm + top would round in units of the top
        taught_own = (y - taught_top) - log_taught_norm
        wanted = tl.exp(taught_own)
        apart += tl.where(wanted > 0, wanted * (taught_own - own), 0.0)
        if GRADIENT:
            slope = tl.exp(own) - (1 - hard) * wanted
            slope -= hard * (column == target.to(tl.int32)).to(tl.float32)
            tl.store(logits + column, slope, column < width)
    loss = (1 - hard) * tl.sum(apart, 0) + hard * (log_norm + (top - at_target))
    tl.store(losses + row, loss)


@triton.jit
def _softmax_terms(logits, width, BLOCK_V: tl.constexpr):
    """The maximum of a row, and the sum of exp(logit - maximum)."""
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
    return top, norm
