"""Gated attention as a composition of PyTorch ops.

Forward runs PyTorch's flash attention or cuDNN's attention on all heads. Backward runs on the heads
of kept groups only; the gate gradient comes from the row sums of grad * output.
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import check_bound

aten = torch.ops.aten


def supports(q: Tensor, key_mask: Tensor | None) -> bool:
    """Return whether the inputs are supported: always on CPU; on CUDA as flash attention does."""
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
    *,
    cudnn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gated and plain output [B, H, S, D], and the log-sum-exp of the scores [B, H, S]."""
    if q.numel() == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        raw, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=wide)
    elif q.is_cuda:
        tensors = _aligned(q), _aligned(k), _aligned(v)
        if cudnn:
            raw, lse, *_ = aten._scaled_dot_product_cudnn_attention(
                *tensors, None, True, 0.0, causal, scale=scale
            )
            lse = lse.squeeze(3)
        else:
            raw, lse, *_ = aten._scaled_dot_product_flash_attention(
                *tensors, 0.0, causal, scale=scale
            )
    else:
        q = _aligned(q)  # ATen's own ops assume dense rows
        k, v = _per_query(q, k), _per_query(q, v)
        mask = _additive(key_mask, q)
        raw, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    if key_mask is not None:
        seen = key_mask.cummax(1).values if causal else key_mask.any(1, keepdim=True)
        raw = raw.where(seen[:, None, :, None], 0.0)  # rows that see no key
    return _serving(q).gate_heads(raw, z), _heads_last(raw), lse.contiguous()


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
    *,
    cudnn: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dz; dq, dk and dv are zero for groups with z = 0."""
    kept = max_kept
    if kept is None:
        kept = int(z.count_nonzero())  # a host sync on CUDA
    elif kept < len(z):
        check_bound(z, kept)
    serving = _serving(grad)
    *packed, dz = serving.pack_heads(grad, q, k, v, z, raw, lse, kept)
    gradients: Iterable[Tensor]
    if packed[0].numel() == 0:
        gradients = (torch.zeros_like(x) for x in packed[1:4])
    elif q.is_cuda:
        gradients = _cuda_backward(*packed, causal=causal, scale=scale, cudnn=cudnn)
    else:
        gradients = _cpu_backward(*packed, causal=causal, scale=scale, key_mask=key_mask)
    if kept < len(z):
        gradients = serving.unpack_heads(*gradients, z, q.shape[1])
    dq, dk, dv = (_heads_last(x) for x in gradients)
    return dq, dk, dv, dz


def _cuda_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    cudnn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    length = q.shape[2]
    tensors = (grad, _aligned(q), _aligned(k), _aligned(v), raw)
    no_ends = (None, None, length, length)  # all sequences have the same length
    if cudnn:
        seed = q.new_empty((), dtype=torch.int64)  # only read for dropout, as below
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(*tensors, lse.unsqueeze(3), seed, seed, None, *no_ends, 0.0, causal), scale=scale
        )
    seeds = (q.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return aten._scaled_dot_product_flash_attention_backward(
        *(*tensors, lse, *no_ends, 0.0, causal, *seeds), scale=scale
    )


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    raw: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q = _aligned(q)  # as in `forward`
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(grad, q, _per_query(q, k), _per_query(q, v), raw, lse, 0.0, causal),
        attn_mask=_additive(key_mask, q),
        scale=scale,
    )
    per_group = (*k.shape[:2], -1, *k.shape[2:])
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (x.view(per_group).sum(2, dtype=wide).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv


def gate_gradient(grad: Tensor, raw: Tensor, z: Tensor) -> Tensor:
    if runs_triton(grad):
        return kernels("attention").delta(grad, raw, z)[1]
    return reference.head_gradient(grad, raw, z)


def _serving(x: Tensor) -> ModuleType:
    return kernels("sdpa") if runs_triton(x) else reference


def _additive(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Turn a [B, S] bool mask into the [B, 1, S, S] mask that is added to the scores."""
    if key_mask is None:
        return None
    length = q.shape[2]
    mask = torch.zeros(len(q), 1, 1, length, dtype=q.dtype, device=q.device)
    mask.masked_fill_(~key_mask[:, None, None, :], float("-inf"))
    return mask.expand(-1, -1, length, -1)


def _aligned(x: Tensor) -> Tensor:
    """Copy x if it is not aligned for flash attention on CUDA, which reads 16 bytes at a time."""
    offsets = (*x.stride()[:3], x.storage_offset())
    return x if x.stride(3) == 1 and not any(n % 8 for n in offsets) else x.contiguous()


def _per_query(q: Tensor, x: Tensor) -> Tensor:
    """Repeat [B, K, S, D] to [B, H, S, D]: not every CPU kernel shares KV heads."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _heads_last(x: Tensor) -> Tensor:
    """Return the same values in memory layout [B, S, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
