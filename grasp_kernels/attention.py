"""Grouped-query causal attention with one gate per KV group."""

from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._checks import autocast_dtype, check_gate, expect


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    causal: bool = True,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """out_h = z_g(h) * softmax(scale * q_h k_g^T + mask) v_g, g(h) = h // (H / K).

    Args:
        q: [B, H, S, D]; k, v: [B, K, S, D] with H a multiple of K; any strides.
        z: [K], any floating dtype; 0/1 or any scale.
        causal: query t sees keys 0..t.
        scale: softmax scale, 1/sqrt(D) by default.
        key_mask: [B, S] bool, True where a key may be attended to. A query without a key gives 0.

    Returns:
        [B, H, S, D] in the dtype of q.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match.
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
    return reference.gated_attention(q, k, v, z, causal, scale, key_mask)
