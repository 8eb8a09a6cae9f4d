"""Gated attention as a composition: PyTorch's flash attention forward on all heads, its backward on
the heads of kept groups only, and the gate gradient from the row sums of grad * output.
"""

import torch
from torch import Tensor

from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import check_bound

aten = torch.ops.aten


def supports(q: Tensor, key_mask: Tensor | None) -> bool:
    """Everything on CPU; on CUDA what flash attention takes."""
    if not q.is_cuda:
        return True
    size_fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.dtype in (torch.float16, torch.bfloat16) and size_fits and key_mask is None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated output, plain output [B, H, S, D] and the log-sum-exp of the scores [B, H, S]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q = q if q.stride(-1) == 1 else q.contiguous()  # ATen's own ops read rows as dense
    if q.numel() == 0:
        raw, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=_wide(q).dtype)
    elif q.is_cuda:
        raw, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    else:
        raw, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(key_mask, q), scale=scale
        )
    if key_mask is not None:
        seen = key_mask.cummax(1).values if causal else key_mask.any(1, keepdim=True)
        raw = raw.where(seen[:, None, :, None], 0.0)  # rows that see no key
    gate = _wide(z).repeat_interleave(groups)[:, None, None]
    return _heads_last((_wide(raw) * gate).to(q.dtype)), _heads_last(raw), lse.contiguous()


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
    max_kept: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dz; zeros for groups with z = 0."""
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    queries = heads // kv_heads
    dz = gate_gradient(grad, raw, z)
    kept = max_kept
    if kept is None:
        kept = int(z.count_nonzero())  # which makes a GPU wait
    elif kept < kv_heads:
        check_bound(z, kept)
    groups = torch.argsort(z == 0, stable=True)[:kept]
    rows = (groups[:, None] * queries + torch.arange(queries, device=q.device)).flatten()
    gate = _wide(z)[groups].repeat_interleave(queries)[:, None, None]
    gated = (_wide(grad.index_select(1, rows)) * gate).to(q.dtype)
    q_kept, raw_kept, lse_kept = (x.index_select(1, rows) for x in (q, raw, lse))
    k_kept, v_kept = (x.index_select(1, groups).repeat_interleave(queries, 1) for x in (k, v))
    tensors = (gated, q_kept, k_kept, v_kept, raw_kept, lse_kept)
    if gated.numel() == 0:
        dq_kept, dk_kept, dv_kept = (torch.zeros_like(x) for x in (q_kept, k_kept, v_kept))
    elif q.is_cuda:
        seed, offset = (q.new_zeros(s, dtype=torch.uint64) for s in ((2,), ()))  # no dropout
        dq_kept, dk_kept, dv_kept = aten._scaled_dot_product_flash_attention_backward(
            *tensors, None, None, length, length, 0.0, causal, seed, offset, scale=scale
        )
    else:
        dq_kept, dk_kept, dv_kept = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, causal, attn_mask=_additive(key_mask, q), scale=scale
        )
    dq = _scatter(q, rows, dq_kept)
    per_group = (batch, kept, queries, length, size)
    dk, dv = (
        _scatter(x, groups, _wide(dx).reshape(per_group).sum(2).to(x.dtype))
        for x, dx in ((k, dk_kept), (v, dv_kept))
    )
    return dq, dk, dv, dz


def gate_gradient(grad: Tensor, raw: Tensor, z: Tensor) -> Tensor:
    if runs_triton(grad):
        return kernels("attention").delta(grad, raw, z)[1]
    products = (_wide(grad) * _wide(raw)).sum((0, 2, 3))
    return products.view(len(z), -1).sum(1).to(z.dtype)


def _additive(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """[B, S] bool -> the [B, 1, S, S] mask that is added to the scores."""
    if key_mask is None:
        return None
    length = q.shape[2]
    mask = torch.zeros(len(q), 1, 1, length, dtype=q.dtype, device=q.device)
    mask.masked_fill_(~key_mask[:, None, None, :], float("-inf"))
    return mask.expand(-1, -1, length, -1)


def _scatter(like: Tensor, index: Tensor, values: Tensor) -> Tensor:
    full = _heads_last(torch.zeros_like(like))
    return full.index_copy_(1, index, values)


def _heads_last(x: Tensor) -> Tensor:
    """The same values in memory layout [B, S, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
