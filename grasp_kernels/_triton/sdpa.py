"""Gate, pack and unpack heads around PyTorch's attention: the head functions of `reference`.

Inputs only need a unit stride along D. Outputs have memory layout [B, S, H, D], viewed as
[B, H, S, D]. Each program reads from the gates whether its group is kept and where it goes.
"""

import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels._triton.attention import _load_tile, _store_tile, _unit
from grasp_kernels._triton.launch import config, launch


def gate_heads(raw: Tensor, z: Tensor) -> Tensor:
    raw = _unit(raw)
    batch, heads, length, _ = raw.shape
    out = _empty(raw, heads)
    tile = config("sdpa", raw.device)
    grid = (batch * heads, triton.cdiv(length, tile.blocks["BLOCK_M"]))
    numbers = (heads, len(z), length, *raw.stride()[:3])
    launch(_gate, grid, tile, raw, z.contiguous(), out, *numbers, **_sizes(raw))
    return out


def pack_heads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, raw: Tensor, lse: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, q, k, v, raw = (_unit(x) for x in (grad, q, k, v, raw))
    batch, heads, length, _ = q.shape
    kv_heads = len(z)
    kept_heads = heads // kv_heads * kept
    gated = _empty(q, kept_heads)
    inputs = packed = q, k, v, raw, lse
    if kept < kv_heads:
        q_kept, raw_kept = _empty(q, kept_heads), _empty(raw, kept_heads)
        lse_kept = lse.new_empty(batch, kept_heads, length)
        packed = q_kept, _empty(k, kept), _empty(v, kept), raw_kept, lse_kept
    tile = config("sdpa", q.device)
    grid = (batch * heads, triton.cdiv(length, tile.blocks["BLOCK_M"]))
    partial = lse.new_empty(batch, heads, grid[1])
    launch(
        _pack,
        grid,
        tile,
        *(grad, z.contiguous(), *inputs, gated, *packed, partial, heads, kv_heads, length, kept),
        *(s for x in (grad, q, k, v, raw) for s in x.stride()[:3]),
        GATHER=kept < kv_heads,
        BLOCK_K=triton.next_power_of_2(kv_heads),
        **_sizes(q),
    )
    dz = partial.sum((0, 2)).view(kv_heads, -1).sum(1)
    return gated, *packed, dz.to(z.dtype)


def unpack_heads(
    dq: Tensor, dk: Tensor, dv: Tensor, z: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _unit(dq), _unit(dk), _unit(dv)
    batch, kept, length, _ = dk.shape
    kv_heads = len(z)
    full = _empty(dq, heads), _empty(dk, kv_heads), _empty(dv, kv_heads)
    tile = config("sdpa", dq.device)
    launch(
        _unpack,
        (batch * heads, triton.cdiv(length, tile.blocks["BLOCK_M"])),
        tile,
        *(dq, dk, dv, z.contiguous(), *full, heads, kv_heads, length, kept),
        *(s for x in (dq, dk, dv) for s in x.stride()[:3]),
        BLOCK_K=triton.next_power_of_2(kv_heads),
        **_sizes(dq),
    )
    return full


def _empty(like: Tensor, heads: int) -> Tensor:
    batch, _, length, size = like.shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _sizes(x: Tensor) -> dict[str, int]:
    return {"D": x.shape[-1], "BLOCK_D": triton.next_power_of_2(x.shape[-1])}


# ---- kernels --------------------------------------------------------------------------------
# A program handles BLOCK_M positions of one head of one sequence; the first head of a group also
# handles its k and v. Pointers are int64 up to the tile, so that tensors may have any span.


@triton.jit
def _place(heads, BLOCK_M: tl.constexpr):
    """Return sequence, head and first position of a program."""
    pair = tl.program_id(0).to(tl.int64)
    return pair // heads, pair % heads, tl.program_id(1).to(tl.int64) * BLOCK_M


@triton.jit
def _load(x, batch, head, first, x_batch, x_head, x_row, length,
          D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    base = x + batch * x_batch + head * x_head + first * x_row
    return _load_tile(base, tl.arange(0, BLOCK_M), x_row, length - first, D, BLOCK_D)


@triton.jit
def _store(x, values, batch, head, heads, first, length,
           D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    base = x + ((batch * length + first) * heads + head) * D
    _store_tile(base, tl.arange(0, BLOCK_M), heads * D, length - first, values, D, BLOCK_D)


@triton.jit
def _slot(z, group, kv_heads, BLOCK_K: tl.constexpr):
    """Return the place of a group in the order of kept, then dropped groups, both ascending."""
    at = tl.arange(0, BLOCK_K)
    is_open = (tl.load(z + at, at < kv_heads, other=0.0) != 0).to(tl.int32)
    before = tl.sum(tl.where(at < group, is_open, 0), 0)
    return tl.where(tl.load(z + group) != 0, before, tl.sum(is_open, 0) + group - before)


@triton.jit
def _gate(
    raw, z, out, heads, kv_heads, length, rb, rh, rs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(heads, BLOCK_M)
    gate = tl.load(z + head // (heads // kv_heads)).to(tl.float32)
    o = _load(raw, batch, head, first, rb, rh, rs, length, D, BLOCK_D, BLOCK_M).to(tl.float32)
    _store(out, o * gate, batch, head, heads, first, length, D, BLOCK_D, BLOCK_M)


@triton.jit
def _pack(
    grad, z, q, k, v, raw, lse, gated, q_kept, k_kept, v_kept, raw_kept, lse_kept, partial,
    heads, kv_heads, length, kept,
    gb, gh, gs, qb, qh, qs, kb, kh, ks, vb, vh, vs, rb, rh, rs,
    GATHER: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(heads, BLOCK_M)
    queries = heads // kv_heads
    group = head // queries
    g = _load(grad, batch, head, first, gb, gh, gs, length, D, BLOCK_D, BLOCK_M).to(tl.float32)
    o = _load(raw, batch, head, first, rb, rh, rs, length, D, BLOCK_D, BLOCK_M)
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + at, tl.sum(tl.sum(g * o.to(tl.float32), 1), 0))
    slot = group
    if GATHER:
        slot = _slot(z, group, kv_heads, BLOCK_K).to(tl.int64)
    if slot < kept:
        gate = tl.load(z + group).to(tl.float32)
        count = queries * kept
        to = slot * queries + head % queries
        _store(gated, g * gate, batch, to, count, first, length, D, BLOCK_D, BLOCK_M)
        if GATHER:
            x = _load(q, batch, head, first, qb, qh, qs, length, D, BLOCK_D, BLOCK_M)
            _store(q_kept, x, batch, to, count, first, length, D, BLOCK_D, BLOCK_M)
            _store(raw_kept, o, batch, to, count, first, length, D, BLOCK_D, BLOCK_M)
            row = first + tl.arange(0, BLOCK_M)
            sums = tl.load(lse + (batch * heads + head) * length + row, row < length, other=0.0)
            tl.store(lse_kept + (batch * count + to) * length + row, sums, row < length)
            if head % queries == 0:
                x = _load(k, batch, group, first, kb, kh, ks, length, D, BLOCK_D, BLOCK_M)
                _store(k_kept, x, batch, slot, kept, first, length, D, BLOCK_D, BLOCK_M)
                x = _load(v, batch, group, first, vb, vh, vs, length, D, BLOCK_D, BLOCK_M)
                _store(v_kept, x, batch, slot, kept, first, length, D, BLOCK_D, BLOCK_M)


@triton.jit
def _unpack(
    dq_kept, dk_kept, dv_kept, z, dq, dk, dv, heads, kv_heads, length, kept,
    qb, qh, qs, kb, kh, ks, vb, vh, vs,
    BLOCK_K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(heads, BLOCK_M)
    queries = heads // kv_heads
    group = head // queries
    slot = _slot(z, group, kv_heads, BLOCK_K).to(tl.int64)
    left = tl.where(slot < kept, length, 0)  # nothing is read for a dropped head
    source = slot * queries + head % queries
    x = _load(dq_kept, batch, source, first, qb, qh, qs, left, D, BLOCK_D, BLOCK_M)
    _store(dq, x, batch, head, heads, first, length, D, BLOCK_D, BLOCK_M)
    if head % queries == 0:
        x = _load(dk_kept, batch, slot, first, kb, kh, ks, left, D, BLOCK_D, BLOCK_M)
        _store(dk, x, batch, group, kv_heads, first, length, D, BLOCK_D, BLOCK_M)
        x = _load(dv_kept, batch, slot, first, vb, vh, vs, left, D, BLOCK_D, BLOCK_M)
        _store(dv, x, batch, group, kv_heads, first, length, D, BLOCK_D, BLOCK_M)
