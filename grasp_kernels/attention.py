"""Grouped-query causal attention with one gate per KV group."""

import math

import torch
from torch import Tensor

from grasp_kernels import _sdpa
from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import autocast_dtype, check_gate, expect, span

# From this length on, the composition is the default in half precision: in published figures (head
# size 128, H100, causal), Triton equals FlashAttention-2 in the forward pass at S = 2048 and is
# slower in the backward pass.
_SDPA_FROM = 1024


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    causal: bool = True,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
    max_kept: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute attention with gated KV groups, with exact gradients for q, k, v and the gates.

    The gates are those of GRASPrune (arXiv 2604.19398), applied to the input of the output
    projection. For query head h in group g = h // (H / K):

        out_h = z_g * o_h     o_h = softmax(scale * q_h k_g^T + mask) v_g
        dz_g  = sum of rowsum(d_out_h * o_h) over tokens and the heads of g

    Flash attention's backward computes that row sum anyway, so dz is nearly free, also for dropped
    groups. dq, dk and dv of a group with z = 0 are zero, and their computation is skipped.

    Args:
        q: [B, H, S, D]; k, v: [B, K, S, D] with H a multiple of K; fp16, bf16, fp32 (or fp64 on
            CPU); any strides.
        z: [K], any floating dtype; 0/1 or any scale.
        causal: query t sees keys 0..t.
        scale: softmax scale, 1/sqrt(D) by default.
        key_mask: [B, S] bool, True where a key may be attended to. A query without a key gives 0.
        max_kept: an upper bound on the number of non-zero z. It saves the "sdpa" backend one host
            sync per backward pass on CUDA. If z has more, the op raises ValueError on CPU and, in
            backends that use the bound, fails a device-side assertion on CUDA.
        backend: "triton" is our flash attention, which skips dropped groups on the device. "sdpa"
            runs PyTorch's flash attention forward, and its backward on kept groups only; on CUDA
            that backward adds dq atomically, so two runs differ in the last bits unless
            torch.use_deterministic_algorithms(True) is set. "cudnn" does the same with cuDNN's
            attention, whose backward is never deterministic. "auto" chooses "sdpa" on CPU. On CUDA
            it chooses "sdpa" for D > 128, and for half precision with S >= 1024, no key_mask and a
            known max_kept (so that nothing syncs); otherwise "triton".

    Returns:
        [B, H, S, D] in the dtype of q, with memory layout [B, S, H, D].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match, or the backend does not
            support the inputs.
    """
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    expect(q.dim() == 4, f"q has shape {list(q.shape)}, expected [B, H, S, D]")
    batch, heads, length, size = q.shape
    expect(
        k.dim() == 4 and (k.shape[0], *k.shape[2:]) == (batch, length, size),
        f"k has shape {list(k.shape)}, expected [B, K, S, D] = [{batch}, K, {length}, {size}]",
    )
    expect(
        v.shape == k.shape,
        f"v has shape {list(v.shape)}, expected that of k, {list(k.shape)}",
    )
    kv_heads = k.shape[1]
    expect(
        kv_heads > 0 and heads % kv_heads == 0,
        f"q has {heads} heads and k has {kv_heads}: expected a multiple",
    )
    check_gate(z, kv_heads, "one gate per KV group", q=q, k=k, v=v)
    if key_mask is not None:
        expect(
            tuple(key_mask.shape) == (batch, length),
            f"key_mask has shape {list(key_mask.shape)}, expected [B, S] = [{batch}, {length}]",
        )
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask is {key_mask.dtype}, expected torch.bool: use .bool()")
        expect(
            key_mask.device == q.device,
            f"key_mask is on {key_mask.device} but q is on {q.device}: move it there",
        )
    expect(
        max_kept is None or 0 <= max_kept <= kv_heads,
        f"max_kept is {max_kept}, expected 0 to {kv_heads}",
    )
    scale = 1 / math.sqrt(size) if scale is None else scale
    backend = _choose(backend, q, k, v, key_mask, max_kept)
    return _attention(q, k, v, z, causal, scale, key_mask, max_kept, backend)[0]


def has_backend(q: Tensor) -> bool:
    """Return whether `gated_attention` supports q [B, H, S, D] on its device without a key_mask."""
    return _sdpa.supports(q, None) or (runs_triton(q) and q.shape[-1] <= 128)


def _choose(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    max_kept: int | None,
) -> str:
    length, size = q.shape[2:]
    expect(
        backend in ("auto", "triton", "sdpa", "cudnn"),
        f'backend is "{backend}", expected "auto", "triton", "sdpa" or "cudnn"',
    )
    # offsets within a sequence are int32, and a launch is limited to 65,535 heads
    spans = [span(x) for x in (q, k, v)] + [q[:1].numel()]  # the last is for the output
    fits = q.shape[0] * q.shape[1] < 2**16 and max(spans) < 2**31
    can_triton = runs_triton(q) and size <= 128 and fits
    can_sdpa = _sdpa.supports(q, key_mask)
    if backend == "auto":
        expect(
            can_triton or can_sdpa,
            f"no backend supports {q.dtype} with head size {size} on {q.device}"
            f"{' and a key_mask' if key_mask is not None else ''}: "
            "head sizes to 128 run in fp16, bf16 and fp32 where a sequence spans less than 2^31 "
            "values; to 256 in fp16, bf16 and no mask",
        )
        long = q.dtype != torch.float32 and length >= _SDPA_FROM and max_kept is not None
        return "triton" if can_triton and not (long and can_sdpa) else "sdpa"
    expect(
        backend != "triton" or can_triton,
        f'backend "triton" requires CUDA tensors of fp16, bf16 or fp32 with head size up to 128, '
        f"fewer than 65,536 heads in a batch and 2^31 values in a sequence, got {q.dtype}, "
        f'{list(q.shape)} on {q.device}: use "auto"',
    )
    expect(
        backend != "sdpa" or can_sdpa,
        f'backend "sdpa" requires fp16 or bf16 on CUDA, head size a multiple of 8 up to 256 and '
        f'no key_mask, got {q.dtype}, {size}: use "auto"',
    )
    expect(
        backend != "cudnn" or (q.is_cuda and can_sdpa and size <= 128),
        f'backend "cudnn" requires fp16 or bf16 on CUDA, head size a multiple of 8 up to 128 and '
        f'no key_mask, got {q.dtype}, {size} on {q.device}: use "auto"',
    )
    return backend


@torch.library.custom_op("grasp::gated_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    max_kept: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gated output; for backward, plain output and the scores' log-sum-exp [B, H, S]."""
    arguments = (q, k, v, z, causal, scale, key_mask)
    if backend == "triton":
        return kernels("attention").forward(*arguments)
    return _sdpa.forward(*arguments, cudnn=backend == "cudnn")


@_attention.register_fake
def _(q, k, v, z, causal, scale, key_mask, max_kept, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    return _heads_last(q), _heads_last(q), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("grasp::gated_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    raw: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    max_kept: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad, q, k, v, z, raw, lse, causal, scale, key_mask)
    if backend == "triton":
        return kernels("attention").backward(*arguments)
    return _sdpa.backward(*arguments, max_kept, cudnn=backend == "cudnn")


@_attention_backward.register_fake
def _(grad, q, k, v, z, raw, lse, key_mask, causal, scale, max_kept, backend):
    return _heads_last(q), _heads_last(k), _heads_last(v), z.new_empty(z.shape)


@torch.library.custom_op("grasp::gated_attention_gate_backward", mutates_args=())
def _gate_backward(grad: Tensor, raw: Tensor, z: Tensor) -> Tensor:
    return _sdpa.gate_gradient(grad, raw, z)


@_gate_backward.register_fake
def _(grad, raw, z):
    return z.new_empty(z.shape)


def _heads_last(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x.new_empty(batch, length, heads, size).transpose(1, 2)


def _save(ctx, inputs, output):
    q, k, v, z, causal, scale, key_mask, max_kept, backend = inputs
    _, raw, lse = output
    ctx.mark_non_differentiable(raw, lse)
    ctx.save_for_backward(q, k, v, z, raw, lse, key_mask)
    ctx.settings = (causal, scale, max_kept, backend)


def _vjp(ctx, grad, *_):
    if not any(ctx.needs_input_grad[:3]):  # the first layer of a frozen model
        _, _, _, z, raw, *_ = ctx.saved_tensors
        return None, None, None, _gate_backward(grad, raw, z), None, None, None, None, None
    gradients = _attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None, None, None, None)


_attention.register_autograd(_vjp, setup_context=_save)
