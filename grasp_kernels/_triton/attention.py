"""Flash attention with grouped KV heads and one gate per group, forward and backward.

Forward writes the gated and the plain output, because backward needs the plain one of dropped
groups. For a group with z = 0, backward runs loops of zero length on the device and stores zeros.
Everything that is linear in the gate is multiplied by it once, at the end. Softmax uses base 2.

Outputs have memory layout [B, S, H, D], viewed as [B, H, S, D], so that the output projection reads
them without a copy. Inputs only need a unit stride along D.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels._checks import span
from grasp_kernels._triton.launch import Config, config, launch


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gated and plain output [B, H, S, D], and the scores' base-2 log-sum-exp [B, H, S]."""
    q, k, v = _unit(q), _unit(k), _unit(v)
    batch, heads, length, _ = q.shape
    out, raw = _heads_last(q), _heads_last(q)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    tile, constants = _tile("attention_forward", q, causal, key_mask)
    launch(
        _forward,
        (triton.cdiv(length, tile.blocks["BLOCK_M"]), batch * heads),
        tile,
        *(q, k, v, z.contiguous(), _mask(key_mask, q), out, raw, lse),
        *(scale * math.log2(math.e), heads, k.shape[1], length),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        **constants,
    )
    return out, raw, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    raw: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dz."""
    grad, q, k, v = _unit(grad), _unit(q), _unit(k), _unit(v)
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    row_sums, dz = delta(grad, raw, z)
    dq, dk, dv = _heads_last(q), _heads_last(k), _heads_last(v)
    inputs = (q, k, v, z.contiguous(), _mask(key_mask, q), grad, lse, row_sums)
    numbers = (scale, scale * math.log2(math.e), heads, kv_heads, length)
    strides = tuple(s for x in (q, k, v, grad) for s in x.stride()[:3])
    tile, constants = _tile("attention_backward_kv", q, causal, key_mask)
    grid = (triton.cdiv(length, tile.blocks["BLOCK_N"]), batch * kv_heads)
    launch(_backward_kv, grid, tile, *inputs, dk, dv, *numbers, *strides, **constants)
    tile, constants = _tile("attention_backward_q", q, causal, key_mask)
    grid = (triton.cdiv(length, tile.blocks["BLOCK_M"]), batch * heads)
    launch(_backward_q, grid, tile, *inputs, dq, *numbers, *strides, **constants)
    return dq, dk, dv, dz


def delta(grad: Tensor, raw: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return row sums of grad * raw [B, H, S] in fp32, and dz [K], their sums per group."""
    grad, raw = _unit(grad), _unit(raw)
    batch, heads, length, size = grad.shape
    row_sums = grad.new_empty(batch, heads, length, dtype=torch.float32)
    tile = config("attention_delta", grad.device)
    blocks = triton.cdiv(length, tile.blocks["BLOCK_M"])
    partial = grad.new_empty(batch, heads, blocks, dtype=torch.float32)
    launch(
        _delta,
        (batch * heads, blocks),  # a second axis allows 65,535
        tile,
        *(grad, raw, row_sums, partial, heads, length, *grad.stride()[:3], *raw.stride()[:3]),
        D=size,
        BLOCK_D=triton.next_power_of_2(size),
    )
    dz = partial.sum((0, 2)).view(len(z), -1).sum(1)
    return row_sums, dz.to(z.dtype)


def _tile(
    name: str, q: Tensor, causal: bool, key_mask: Tensor | None
) -> tuple[Config, dict[str, int | bool]]:
    size = q.shape[-1]
    block = max(16, triton.next_power_of_2(size))
    key = (name, 8 * q.element_size(), 64 if block <= 64 else 128)
    constants = {"CAUSAL": causal, "MASKED": key_mask is not None, "D": size, "BLOCK_D": block}
    return config(key, q.device), constants


def _unit(x: Tensor) -> Tensor:
    """Copy x [B, H, S, D] unless its stride along D is 1 and a sequence spans < 2^31 values."""
    return x if x.stride(-1) == 1 and span(x) < 2**31 else x.contiguous()


def _heads_last(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x.new_empty(batch, length, heads, size).transpose(1, 2)


def _mask(key_mask: Tensor | None, q: Tensor) -> Tensor:
    """Return the mask; without one, any tensor, since the kernel does not read it."""
    return q if key_mask is None else key_mask.contiguous()


# ---- kernels --------------------------------------------------------------------------------
# M rows are queries, N columns are keys; `base` points to one head of one sequence.


@triton.jit
def _load_tile(base, row, stride, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = row[:, None] < length
    if D < BLOCK_D:
        inside = inside & (d < D)[None, :]
    return tl.load(base + row[:, None] * stride + d[None, :], inside, other=0.0)


@triton.jit
def _store_tile(base, row, stride, length, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (row[:, None] < length) & (d < D)[None, :]
    tl.store(base + row[:, None] * stride + d[None, :], x, inside)


@triton.jit
def _visible(row, column, length, key_mask, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
             MASKED: tl.constexpr):  # fmt: skip
    """Which (row, column) pairs count; row: [M, 1], column: [1, N]."""
    seen = column < length
    if EDGE and CAUSAL:
        seen = seen & (row >= column)
    if MASKED:
        seen = seen & (tl.load(key_mask + column, column < length, other=0) != 0)
    return seen


@triton.jit
def _attend(
    q, acc, peak, total, k, v, key_mask, row, start, end, scale_log2, length, k_stride, v_stride,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for n in range(start, end, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        k_tile = _load_tile(k, column, k_stride, length, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale_log2
        if EDGE or MASKED:
            seen = _visible(row[:, None], column[None, :], length, key_mask, EDGE, CAUSAL, MASKED)
            s = tl.where(seen, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows that saw no key yet
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _load_tile(v, column, v_stride, length, D, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit
def _forward(
    q, k, v, z, key_mask, out, raw, lse, scale_log2, heads, kv_heads, length,
    qb, qh, qs, kb, kh, ks, vb, vh, vs,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group = head // (heads // kv_heads)
    k += batch * kb + group * kh
    v += batch * vb + group * vh
    key_mask += batch * length
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(q + batch * qb + head * qh, row, qs, length, D, BLOCK_D)

    end = length
    full = length // BLOCK_N * BLOCK_N  # columns below it need no comparison
    if CAUSAL:
        end = tl.minimum(length, (block + 1) * BLOCK_M)
        full = block * BLOCK_M // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = _attend(
        q_tile, acc, peak, total, k, v, key_mask, row, 0, full, scale_log2, length, ks, vs,
        False, CAUSAL, MASKED, D, BLOCK_D, BLOCK_N)  # fmt: skip
    acc, peak, total = _attend(
        q_tile, acc, peak, total, k, v, key_mask, row, full, end, scale_log2, length, ks, vs,
        True, CAUSAL, MASKED, D, BLOCK_D, BLOCK_N)  # fmt: skip

    # A row without a key has total 0: its output is 0, and its lse makes every p of backward 0.
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log_sum = tl.where(empty, float("inf"), peak + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + tl.program_id(1).to(tl.int64) * length + row, log_sum, row < length)
    at = (batch * length * heads + head) * D
    _store_tile(raw + at, row, heads * D, length, acc, D, BLOCK_D)
    gate = tl.load(z + group).to(tl.float32)
    _store_tile(out + at, row, heads * D, length, acc * gate, D, BLOCK_D)


@triton.jit
def _delta(
    grad, raw, row_sums, partial, heads, length, gb, gh, gs, rb, rh, rs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)  # index of a sequence and a head
    batch, head = pair // heads, pair % heads
    first = tl.program_id(1).to(tl.int64) * BLOCK_M  # int64 up to the tile, for any span
    left = length - first
    row = tl.arange(0, BLOCK_M)
    g_base = grad + batch * gb + head * gh + first * gs
    o_base = raw + batch * rb + head * rh + first * rs
    g = _load_tile(g_base, row, gs, left, D, BLOCK_D).to(tl.float32)
    o = _load_tile(o_base, row, rs, left, D, BLOCK_D).to(tl.float32)
    sums = tl.sum(g * o, 1)
    tl.store(row_sums + pair * length + first + row, sums, row < left)
    tl.store(partial + pair * tl.num_programs(1) + tl.program_id(1), tl.sum(sums, 0))


@triton.jit
def _accumulate_kv(
    dk, dv, k_tile, v_tile, q, grad, lse, row_sums, column, start, end,
    scale_log2, length, q_stride, g_stride,
    EDGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    for m in range(start, end, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        q_tile = _load_tile(q, row, q_stride, length, D, BLOCK_D)
        g_tile = _load_tile(grad, row, g_stride, length, D, BLOCK_D)
        log_sum = tl.load(lse + row, row < length, other=float("inf"))  # rows outside: p = 0
        sums = tl.load(row_sums + row, row < length, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2  # [N, M]
        if EDGE:
            s = tl.where(row[None, :] >= column[:, None], s, float("-inf"))
        p = tl.exp2(s - log_sum[None, :])
        dv = tl.dot(p.to(g_tile.dtype), g_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
        ds = p * (dp - sums[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_kv(
    q, k, v, z, key_mask, grad, lse, row_sums, dk, dv,
    scale, scale_log2, heads, kv_heads, length,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N  # the longest columns come first by themselves
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    group = tl.program_id(1) % kv_heads
    gate = tl.load(z + group).to(tl.float32)
    column = first + tl.arange(0, BLOCK_N)
    k_tile = _load_tile(k + batch * kb + group * kh, column, ks, length, D, BLOCK_D)
    v_tile = _load_tile(v + batch * vb + group * vh, column, vs, length, D, BLOCK_D)

    start = 0
    full = 0  # rows from here on need no comparison
    if CAUSAL:
        start = first // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(first + BLOCK_N, BLOCK_M) * BLOCK_M, length)
    end = length
    if gate == 0:
        start = 0
        full = 0
        end = 0
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    queries = heads // kv_heads
    for i in range(queries):
        head = group * queries + i
        q_head = q + batch * qb + head * qh
        g_head = grad + batch * gb + head * gh
        rows = (batch * heads + head) * length
        if CAUSAL:
            dk_acc, dv_acc = _accumulate_kv(
                dk_acc, dv_acc, k_tile, v_tile, q_head, g_head, lse + rows, row_sums + rows,
                column, start, full, scale_log2, length, qs, gs,
                True, D, BLOCK_D, BLOCK_M)  # fmt: skip
        dk_acc, dv_acc = _accumulate_kv(
            dk_acc, dv_acc, k_tile, v_tile, q_head, g_head, lse + rows, row_sums + rows,
            column, full, end, scale_log2, length, qs, gs,
            False, D, BLOCK_D, BLOCK_M)  # fmt: skip
    if MASKED:  # a key affects only its own row of dk and dv
        seen = tl.load(key_mask + batch * length + column, column < length, other=0) != 0
        dk_acc = tl.where(seen[:, None], dk_acc, 0.0)
        dv_acc = tl.where(seen[:, None], dv_acc, 0.0)
    at = (batch * length * kv_heads + group) * D
    _store_tile(dk + at, column, kv_heads * D, length, dk_acc * (gate * scale), D, BLOCK_D)
    _store_tile(dv + at, column, kv_heads * D, length, dv_acc * gate, D, BLOCK_D)


@triton.jit
def _accumulate_q(
    dq, q_tile, g_tile, log_sum, sums, k, v, key_mask, row, start, end,
    scale_log2, length, k_stride, v_stride,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for n in range(start, end, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        k_tile = _load_tile(k, column, k_stride, length, D, BLOCK_D)
        v_tile = _load_tile(v, column, v_stride, length, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
        if EDGE or MASKED:
            seen = _visible(row[:, None], column[None, :], length, key_mask, EDGE, CAUSAL, MASKED)
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s - log_sum[:, None])
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - sums[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _backward_q(
    q, k, v, z, key_mask, grad, lse, row_sums, dq,
    scale, scale_log2, heads, kv_heads, length,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group = head // (heads // kv_heads)
    gate = tl.load(z + group).to(tl.float32)
    k += batch * kb + group * kh
    v += batch * vb + group * vh
    key_mask += batch * length
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(q + batch * qb + head * qh, row, qs, length, D, BLOCK_D)
    g_tile = _load_tile(grad + batch * gb + head * gh, row, gs, length, D, BLOCK_D)
    rows = tl.program_id(1).to(tl.int64) * length
    log_sum = tl.load(lse + rows + row, row < length, other=float("inf"))
    sums = tl.load(row_sums + rows + row, row < length, other=0.0)

    end = length
    full = length // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(length, (block + 1) * BLOCK_M)
        full = block * BLOCK_M // BLOCK_N * BLOCK_N
    if gate == 0:
        full = 0
        end = 0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _accumulate_q(
        acc, q_tile, g_tile, log_sum, sums, k, v, key_mask, row, 0, full, scale_log2, length,
        ks, vs, False, CAUSAL, MASKED, D, BLOCK_D, BLOCK_N)  # fmt: skip
    acc = _accumulate_q(
        acc, q_tile, g_tile, log_sum, sums, k, v, key_mask, row, full, end, scale_log2, length,
        ks, vs, True, CAUSAL, MASKED, D, BLOCK_D, BLOCK_N)  # fmt: skip
    at = (batch * length * heads + head) * D
    _store_tile(dq + at, row, heads * D, length, acc * (gate * scale), D, BLOCK_D)
