"""Gated SwiGLU on [T, F] activations: the functions of `reference`, as kernels.

Tensors need a unit stride along F; any row stride works, so halves of a merged projection need no
copy. All arithmetic is fp32. Token sums go to one fp32 partial per block of rows and are then added
in a fixed order: no atomics, the same bits on every run.
"""

import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels._triton.launch import config, launch
from grasp_kernels._triton.rows import partials, rows


def gated_swiglu(gate_pre: Tensor, up: Tensor, z: Tensor) -> Tensor:
    a, u, z = rows(gate_pre), rows(up), z.contiguous()
    tokens, width = a.shape
    out = a.new_empty(tokens, width)
    tile = config("swiglu", a.device)
    columns = triton.cdiv(width, tile.blocks["BLOCK_F"])
    grid = (columns * triton.cdiv(tokens, tile.blocks["BLOCK_T"]),)  # a second axis allows 65,535
    launch(_forward, grid, tile, a, u, z, out, tokens, width, a.stride(0), u.stride(0))
    return out


def swiglu_backward(
    grad: Tensor, gate_pre: Tensor, up: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_gate, d_up = (x.new_empty(x.shape) for x in (gate_pre, up))  # row-major, whatever the inputs
    return d_gate, d_up, _backward_into(grad, gate_pre, up, z, d_gate, d_up)


def swiglu_pack(
    gate_pre: Tensor, up: Tensor, z: Tensor, order: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = gate_pre.shape
    if kept == width:
        return gated_swiglu(gate_pre, up, z), gate_pre, up, gate_pre.new_empty(tokens, 0)
    a, u, z = rows(gate_pre), rows(up), z.contiguous()
    hidden, a_kept, u_kept = (a.new_empty(tokens, kept) for _ in range(3))
    dropped = a.new_empty(tokens, width - kept)
    tile = config("swiglu_pack", a.device)
    columns = _packed_blocks(kept, width, tile.blocks["BLOCK_F"])
    launch(
        _pack,
        (columns * triton.cdiv(tokens, tile.blocks["BLOCK_T"]),),
        tile,
        *(a, u, z, order, hidden, a_kept, u_kept, dropped),
        *(tokens, width, kept, a.stride(0), u.stride(0)),
    )
    return hidden, a_kept, u_kept, dropped


def swiglu_pack_backward(
    grad: Tensor, gate_pre: Tensor, up: Tensor, dropped: Tensor, z: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    grad = rows(grad)
    (tokens, width), kept = grad.shape, gate_pre.shape[1]
    d_packed = grad.new_empty(tokens, 2 * kept)
    if kept == width:
        d_gate, d_up = d_packed[:, :width], d_packed[:, width:]
        return d_packed, _backward_into(grad, gate_pre, up, z, d_gate, d_up)
    tile = config("swiglu_pack_backward", grad.device)
    columns = _packed_blocks(kept, width, tile.blocks["BLOCK_F"])
    partial = partials(triton.cdiv(tokens, tile.blocks["ROWS"]), width, z)
    launch(
        _pack_backward,
        (columns, len(partial)),
        tile,
        *(grad, gate_pre, up, dropped, z.contiguous(), order, d_packed, partial),
        *(tokens, width, kept, grad.stride(0)),
    )
    return d_packed, partial.sum(0).to(z.dtype)


def _backward_into(
    grad: Tensor, gate_pre: Tensor, up: Tensor, z: Tensor, d_gate: Tensor, d_up: Tensor
) -> Tensor:
    """Fill d_gate and d_up, which may be halves of one buffer; return dz."""
    grad, a, u = rows(grad), rows(gate_pre), rows(up)
    tokens, width = a.shape
    tile = config("swiglu_backward", a.device)
    partial = partials(triton.cdiv(tokens, tile.blocks["ROWS"]), width, z)
    launch(
        _backward,
        (triton.cdiv(width, tile.blocks["BLOCK_F"]), len(partial)),
        tile,
        *(grad, a, u, z.contiguous(), d_gate, d_up, partial, tokens, width),
        *(grad.stride(0), a.stride(0), u.stride(0), d_gate.stride(0)),
    )
    return partial.sum(0).to(z.dtype)


def _packed_blocks(kept: int, width: int, block: int) -> int:
    """Count column blocks of the packed order: a block is all kept or all dropped."""
    return triton.cdiv(kept, block) + triton.cdiv(width - kept, block)


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def _forward(
    gate_pre, up, z, out, tokens, width, a_stride, u_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(width, BLOCK_F)
    column = tl.program_id(0) % columns * BLOCK_F + tl.arange(0, BLOCK_F)
    first = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    inside = (row[:, None] < tokens - first) & (column < width)[None, :]
    gate = tl.load(z + column, column < width, other=0.0).to(tl.float32)
    a_at = gate_pre + first * a_stride + row[:, None] * a_stride + column[None, :]
    u_at = up + first * u_stride + row[:, None] * u_stride + column[None, :]
    a = tl.load(a_at, inside, other=0.0).to(tl.float32)
    u = tl.load(u_at, inside, other=0.0).to(tl.float32)
    h = a * tl.sigmoid(a) * u * gate[None, :]
    tl.store(out + first * width + row[:, None] * width + column[None, :], h, inside)


@triton.jit
def _backward(
    grad, gate_pre, up, z, d_gate, d_up, partial, tokens, width,
    g_stride, a_stride, u_stride, d_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1).to(tl.int64) * ROWS
    gate = tl.load(z + column, column < width, other=0.0).to(tl.float32)
    dz = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        inside = (row[:, None] < tokens - first) & (column < width)[None, :]
        g_at = grad + first * g_stride + row[:, None] * g_stride + column[None, :]
        a_at = gate_pre + first * a_stride + row[:, None] * a_stride + column[None, :]
        u_at = up + first * u_stride + row[:, None] * u_stride + column[None, :]
        g = tl.load(g_at, inside, other=0.0).to(tl.float32)
        a = tl.load(a_at, inside, other=0.0).to(tl.float32)
        u = tl.load(u_at, inside, other=0.0).to(tl.float32)
        da, du, dz_rows = _gradients(g, a, u, gate[None, :])
        at = first * d_stride + row[:, None] * d_stride + column[None, :]
        tl.store(d_gate + at, da, inside)
        tl.store(d_up + at, du, inside)
        dz += dz_rows
    dz_at = partial + tl.program_id(1).to(tl.int64) * width + column
    tl.store(dz_at, tl.sum(dz, 0), column < width)


@triton.jit
def _gradients(g, a, u, gate):
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    du = g * silu
    da = g * u * (sigmoid + silu * (1 - sigmoid))
    return da * gate, du * gate, du * u


@triton.jit
def _packed_columns(block, width, kept, BLOCK_F: tl.constexpr):
    """Return whether a block of the packed order is kept, its columns there, and their number."""
    kept_blocks = tl.cdiv(kept, BLOCK_F)
    is_kept = block < kept_blocks
    column = tl.where(is_kept, block, block - kept_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    return is_kept, column, tl.where(is_kept, kept, width - kept)


@triton.jit
def _pack(
    gate_pre, up, z, order, hidden, a_kept, u_kept, dropped, tokens, width, kept,
    a_stride, u_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(kept, BLOCK_F) + tl.cdiv(width - kept, BLOCK_F)
    is_kept, column, count = _packed_columns(tl.program_id(0) % columns, width, kept, BLOCK_F)
    valid = column < count
    source = tl.load(order + tl.where(is_kept, column, kept + column), valid, other=0)
    source = source.to(tl.int32)
    first = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    inside = (row[:, None] < tokens - first) & valid[None, :]
    a_at = gate_pre + first * a_stride + row[:, None] * a_stride + source[None, :]
    u_at = up + first * u_stride + row[:, None] * u_stride + source[None, :]
    a = tl.load(a_at, inside, other=0.0)
    u = tl.load(u_at, inside, other=0.0)
    wide = a.to(tl.float32)
    h = wide * tl.sigmoid(wide) * u.to(tl.float32)
    at = first * count + row[:, None] * count + column[None, :]
    if is_kept:
        gate = tl.load(z + source, valid, other=0.0).to(tl.float32)
        tl.store(hidden + at, h * gate[None, :], inside)
        tl.store(a_kept + at, a, inside)
        tl.store(u_kept + at, u, inside)
    else:
        tl.store(dropped + at, h, inside)


@triton.jit
def _pack_backward(
    grad, gate_pre, up, dropped, z, order, d_packed, partial, tokens, width, kept, g_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    is_kept, column, count = _packed_columns(tl.program_id(0), width, kept, BLOCK_F)
    valid = column < count
    source = tl.load(order + tl.where(is_kept, column, kept + column), valid, other=0)
    source = source.to(tl.int32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    dz = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    if is_kept:
        gate = tl.load(z + source, valid, other=0.0).to(tl.float32)
        for start in range(0, ROWS, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            inside = (row[:, None] < tokens - first) & valid[None, :]
            g_at = grad + first * g_stride + row[:, None] * g_stride + source[None, :]
            at = first * kept + row[:, None] * kept + column[None, :]
            g = tl.load(g_at, inside, other=0.0).to(tl.float32)
            a = tl.load(gate_pre + at, inside, other=0.0).to(tl.float32)
            u = tl.load(up + at, inside, other=0.0).to(tl.float32)
            da, du, dz_rows = _gradients(g, a, u, gate[None, :])
            d_at = d_packed + first * 2 * kept + row[:, None] * 2 * kept + column[None, :]
            tl.store(d_at, da, inside)
            tl.store(d_at + kept, du, inside)
            dz += dz_rows
    else:
        for start in range(0, ROWS, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            inside = (row[:, None] < tokens - first) & valid[None, :]
            g_at = grad + first * g_stride + row[:, None] * g_stride + source[None, :]
            at = first * count + row[:, None] * count + column[None, :]
            g = tl.load(g_at, inside, other=0.0).to(tl.float32)
            h = tl.load(dropped + at, inside, other=0.0).to(tl.float32)
            dz += g * h
    tl.store(partial + tl.program_id(1).to(tl.int64) * width + source, tl.sum(dz, 0), valid)
