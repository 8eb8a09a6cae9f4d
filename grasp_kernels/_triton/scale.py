"""Channel scales on [T, C] activations: the functions of `reference`, as kernels.

Tensors need a unit stride along C; any row stride works. All arithmetic is fp32. Token sums go to
one fp32 partial per block of rows and are then added in a fixed order, as in `swiglu`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels._triton.launch import Config, config, launch
from grasp_kernels._triton.rows import partials, rows


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    x = rows(x)
    tokens, width = x.shape
    out = x.new_empty(tokens, width)
    tile = config("channel_scale", x.device)
    columns = triton.cdiv(width, tile.blocks["BLOCK_F"])
    grid = (columns * triton.cdiv(tokens, tile.blocks["BLOCK_T"]),)  # a second axis allows 65,535
    launch(_scale, grid, tile, x, scale.contiguous(), out, tokens, width, x.stride(0))
    return out


def channel_scale_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    grad, x = rows(grad), rows(x)
    tokens, width = x.shape
    dx = x.new_empty(tokens, width)
    tile = config("channel_scale_backward", x.device)
    partial = partials(triton.cdiv(tokens, tile.blocks["ROWS"]), width, scale)
    launch(
        _scale_backward,
        (triton.cdiv(width, tile.blocks["BLOCK_F"]), len(partial)),
        tile,
        *(grad, x, scale.contiguous(), dx, partial, tokens, width, grad.stride(0), x.stride(0)),
    )
    return dx, partial.sum(0).to(scale.dtype)


def rms_norm_scale_forward(
    x: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = rows(x)
    tokens, width = x.shape
    out, inverse = x.new_empty(tokens, width), x.new_empty(tokens, dtype=torch.float32)
    tile, block = _row("rms_norm_scale", x)
    launch(
        _norm,
        (tokens,),
        tile,
        *(x, weight.contiguous(), scale.contiguous(), out, inverse, width, eps, x.stride(0)),
        BLOCK=block,
    )
    return out, inverse


def rms_norm_scale_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    grad, x = rows(grad), rows(x)
    tokens, width = x.shape
    dx = x.new_empty(tokens, width)
    tile, block = _row("rms_norm_scale_backward", x)
    each = max(1, triton.cdiv(tokens, tile.blocks["PROGRAMS"]))  # rows per program
    partial = partials(triton.cdiv(tokens, each), width, scale)
    launch(
        _norm_backward,
        (len(partial),),
        tile,
        *(grad, x, inverse, weight.contiguous(), scale.contiguous(), dx, partial),
        *(tokens, width, grad.stride(0), x.stride(0)),
        BLOCK=block,
    )
    return dx, partial.sum(0).to(scale.dtype)


def _row(kernel: str, x: Tensor) -> tuple[Config, int]:
    """Return configuration and block size for a program that holds a whole row."""
    block = triton.next_power_of_2(x.shape[1])
    key = (kernel, 8 * x.element_size(), 4096 if block <= 4096 else 16_384)
    return config(key, x.device), block


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def _scale(
    x, scale, out, tokens, width, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(width, BLOCK_F)
    column = tl.program_id(0) % columns * BLOCK_F + tl.arange(0, BLOCK_F)
    first = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    inside = (row[:, None] < tokens - first) & (column < width)[None, :]
    factor = tl.load(scale + column, column < width, other=0.0).to(tl.float32)
    x_at = x + first * x_stride + row[:, None] * x_stride + column[None, :]
    values = tl.load(x_at, inside, other=0.0).to(tl.float32)
    at = first * width + row[:, None] * width + column[None, :]
    tl.store(out + at, values * factor[None, :], inside)


@triton.jit
def _scale_backward(
    grad, x, scale, dx, partial, tokens, width, g_stride, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1).to(tl.int64) * ROWS
    factor = tl.load(scale + column, column < width, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        inside = (row[:, None] < tokens - first) & (column < width)[None, :]
        g_at = grad + first * g_stride + row[:, None] * g_stride + column[None, :]
        x_at = x + first * x_stride + row[:, None] * x_stride + column[None, :]
        g = tl.load(g_at, inside, other=0.0).to(tl.float32)
        sums += g * tl.load(x_at, inside, other=0.0).to(tl.float32)
        at = first * width + row[:, None] * width + column[None, :]
        tl.store(dx + at, g * factor[None, :], inside)
    sums_at = partial + tl.program_id(1).to(tl.int64) * width + column
    tl.store(sums_at, tl.sum(sums, 0), column < width)


@triton.jit
def _norm(
    x, weight, scale, out, inverse, width, eps, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    w = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    factor = w * tl.load(scale + column, inside, other=0.0).to(tl.float32)
    tl.store(inverse + row, r)
    tl.store(out + row * width + column, values * r * factor, inside)


@triton.jit
def _norm_backward(
    grad, x, inverse, weight, scale, dx, partial, tokens, width, g_stride, x_stride,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    factor = w * tl.load(scale + column, inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    each = tl.cdiv(tokens, PROGRAMS)
    first = tl.program_id(0).to(tl.int64) * each
    for row in range(tl.minimum(each, tokens - first)):
        r = tl.load(inverse + first + row)
        g_at = grad + first * g_stride + row * g_stride + column
        x_at = x + first * x_stride + row * x_stride + column
        g = tl.load(g_at, inside, other=0.0).to(tl.float32)
        n = tl.load(x_at, inside, other=0.0).to(tl.float32) * r
        sums += g * n
        g *= factor
        d = r * (g - n * (tl.sum(g * n, 0) / width))
        tl.store(dx + first * width + row * width + column, d, inside)
    w = tl.load(weight + column, inside, other=0.0).to(tl.float32)  # again: registers are scarce
    sums_at = partial + tl.program_id(0).to(tl.int64) * width + column
    tl.store(sums_at, sums * w, inside)
