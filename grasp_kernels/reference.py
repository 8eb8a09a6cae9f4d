"""The ops in plain PyTorch: their definitions, the oracle of the tests, and the CPU path.

The first function of each section defines the op; autograd through it gives the exact gradients.
The functions after it are the parts that the CPU path runs, split in the same way as the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- gated SwiGLU ---------------------------------------------------------------------------


def gated_swiglu(gate_pre: Tensor, up: Tensor, z: Tensor) -> Tensor:
    """silu(gate_pre) * up * z, computed in fp32 (fp64 for fp64 inputs); [..., F], [..., F], [F]."""
    a, u, z = _wide(gate_pre), _wide(up), _wide(z)
    return (F.silu(a) * u * z).to(gate_pre.dtype)


def gated_swiglu_ffn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, z: Tensor) -> Tensor:
    """The gated FFN with weights as in nn.Linear: [F, d], [F, d], [d, F]."""
    return F.linear(gated_swiglu(F.linear(x, w_gate), F.linear(x, w_up), z), w_down)


def swiglu_backward(
    grad: Tensor, gate_pre: Tensor, up: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate_pre, d_up [T, F] and dz [F] of `gated_swiglu` on [T, F] inputs."""
    g, a, u, z_wide = _wide(grad), _wide(gate_pre), _wide(up), _wide(z)
    d_up = g * F.silu(a)
    dz = (d_up * u).sum(0)
    d_gate = torch.ops.aten.silu_backward((g * u).mul_(z_wide), a)
    return d_gate.to(gate_pre.dtype), d_up.mul_(z_wide).to(up.dtype), dz.to(z.dtype)


def swiglu_pack(
    gate_pre: Tensor, up: Tensor, z: Tensor, order: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compact [T, F] activations; `order` [F] lists the kept channels first.

    Returns, for the kept channels, the gated hidden state and (for backward) gate_pre and up, all
    [T, kept]; for the dropped channels, silu(gate_pre) * up [T, F - kept] (for backward).
    """
    if kept == len(z):
        return gated_swiglu(gate_pre, up, z), gate_pre, up, gate_pre.new_empty(len(gate_pre), 0)
    index, rest = order[:kept], order[kept:]
    a, u = gate_pre.index_select(1, index), up.index_select(1, index)
    hidden = gated_swiglu(a, u, z[index])
    dropped = _wide(gate_pre.index_select(1, rest)), _wide(up.index_select(1, rest))
    return hidden, a, u, (F.silu(dropped[0]) * dropped[1]).to(up.dtype)


def swiglu_pack_backward(
    grad: Tensor, gate_pre: Tensor, up: Tensor, dropped: Tensor, z: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gradients of kept channels [T, 2 * kept], gate then up half, and dz of all [F].

    `grad` [T, F] is the gradient of the hidden state; the other arguments are inputs or outputs of
    `swiglu_pack`.
    """
    kept = gate_pre.shape[1]
    if kept == len(z):
        d_gate, d_up, dz = swiglu_backward(grad, gate_pre, up, z)
        return torch.cat([d_gate, d_up], 1), dz
    index, rest = order[:kept], order[kept:]
    d_gate, d_up, dz_kept = swiglu_backward(grad.index_select(1, index), gate_pre, up, z[index])
    dz_dropped = (_wide(grad.index_select(1, rest)) * _wide(dropped)).sum(0)
    dz = torch.empty_like(z)
    dz[index] = dz_kept
    dz[rest] = dz_dropped.to(z.dtype)
    return torch.cat([d_gate, d_up], 1), dz


# ---- channel scales -------------------------------------------------------------------------


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale, computed in fp32 (fp64 for fp64 inputs); [..., C], [C]."""
    return (_wide(x) * _wide(scale)).to(x.dtype)


def channel_scale_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx [T, C] and d_scale [C] of `channel_scale` on [T, C] inputs."""
    g = _wide(grad)
    d_scale = (g * _wide(x)).sum(0)
    return (g * _wide(scale)).to(x.dtype), d_scale.to(scale.dtype)


# ---- channel scales in a norm ---------------------------------------------------------------


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale, computed in fp32; [..., d], [d], [d]."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (_wide(weight) * _wide(scale))).to(x.dtype)


def rms_norm_scale_forward(
    x: Tensor, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `rms_norm_scale` on [T, d], and the inverse root mean square [T] for backward."""
    wide = _wide(x)
    inverse = torch.rsqrt(wide.square().mean(1) + eps)
    out = (wide * inverse[:, None]).mul_(_wide(weight) * _wide(scale))
    return out.to(x.dtype), inverse


def rms_norm_scale_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """dx [T, d] and d_scale [d] of `rms_norm_scale` on [T, d] inputs."""
    r, w = inverse[:, None], _wide(weight)
    factor = w * _wide(scale)
    g, normed = _wide(grad), _wide(x) * r
    product = g * normed
    d_scale = product.sum(0).mul_(w)
    mean = (product * factor).mean(1, keepdim=True)  # a matmul would be narrow under autocast
    dx = (g * factor).sub_(normed.mul_(mean)).mul_(r)
    return dx.to(x.dtype), d_scale.to(scale.dtype)


# ---- gated attention ------------------------------------------------------------------------


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention times the gate of each KV group.

    q [B, H, S, D]; k, v [B, K, S, D]; z [K].
    `key_mask` [B, S] is True where a key may be attended to. A query without any key gives 0.
    """
    heads, kv_heads, length = q.shape[1], k.shape[1], q.shape[2]
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :].expand(-1, -1, length, -1)
        if causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    gate = z.repeat_interleave(heads // kv_heads)
    return (_wide(out) * _wide(gate)[:, None, None]).to(q.dtype)


def gate_heads(raw: Tensor, z: Tensor) -> Tensor:
    """Multiply raw [B, H, S, D] by the gates z [K] of its groups; memory layout [B, S, H, D]."""
    gate = _wide(z).repeat_interleave(raw.shape[1] // len(z))
    return (_wide(raw).transpose(1, 2) * gate[:, None]).to(raw.dtype).contiguous().transpose(1, 2)


def head_gradient(grad: Tensor, raw: Tensor, z: Tensor) -> Tensor:
    """Return dz [K] of `gate_heads`; `grad` is the gradient of its output."""
    products = (_wide(grad) * _wide(raw)).sum((0, 2, 3))
    return products.view(len(z), -1).sum(1).to(z.dtype)


def pack_heads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, raw: Tensor, lse: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather what attention's backward needs for `kept` groups, with z != 0 first.

    grad, q, raw [B, H, S, D]; k, v [B, K, S, D]; lse [B, H, S]. Returns grad times the gates, q, k,
    v, raw and lse of these groups, and dz [K] of all groups.
    """
    dz = head_gradient(grad, raw, z)
    gated = gate_heads(grad, z)
    if kept == len(z):
        return gated, q, k, v, raw, lse, dz
    groups, heads = _kept_heads(z, kept, q.shape[1])
    gated, q, raw, lse = (x.index_select(1, heads) for x in (gated, q, raw, lse))
    return gated, q, k.index_select(1, groups), v.index_select(1, groups), raw, lse, dz


def unpack_heads(
    dq: Tensor, dk: Tensor, dv: Tensor, z: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand gradients of the groups that `pack_heads` kept to all groups, with zeros elsewhere."""
    groups, rows = _kept_heads(z, dk.shape[1], heads)

    def full(values: Tensor, count: int, index: Tensor) -> Tensor:
        batch, _, length, size = values.shape
        zeros = values.new_zeros(batch, length, count, size).transpose(1, 2)
        return zeros.index_copy_(1, index, values)

    return full(dq, heads, rows), full(dk, len(z), groups), full(dv, len(z), groups)


def _kept_heads(z: Tensor, kept: int, heads: int) -> tuple[Tensor, Tensor]:
    """Return the first `kept` groups, with z != 0 first, and the query heads in them."""
    groups = torch.argsort(z == 0, stable=True)[:kept]
    return groups, torch.arange(heads, device=z.device).view(len(z), -1)[groups].flatten()


# ---- linear cross-entropy -------------------------------------------------------------------


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, fp32, of the logits x weight^T; x [T, d], weight [V, d], targets [T]."""
    return F.cross_entropy(_wide(F.linear(x, weight)), targets)


def softmax_loss(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy, fp32 [T], of each row of logits [T, V], and the gradient of their sum.

    The gradient has the shape and dtype of the logits and may reuse their memory. If `gradient` is
    false, the second result is undefined.
    """
    target = targets[:, None]
    p = _wide(logits)
    top = p.amax(1, keepdim=True)
    at_target = p.gather(1, target)
    p = p.sub_(top).exp_()
    norm = p.sum(1, keepdim=True)
    losses = norm.log() + (top - at_target)
    if not gradient:
        return losses.squeeze(1), logits
    p.div_(norm).scatter_add_(1, target, torch.full_like(norm, -1.0))
    return losses.squeeze(1), p.to(logits.dtype)


def linear_distillation(
    x: Tensor, weight: Tensor, teacher: Tensor, targets: Tensor, hard: float
) -> Tensor:
    """Mean of (1 - hard) KL(teacher || student) + hard * cross-entropy, fp32.

    x and teacher [T, d] give logits by weight [V, d]; targets [T].
    """
    student = F.linear(x, weight)
    own, taught = (_wide(y).log_softmax(1) for y in (student, F.linear(teacher, weight)))
    divergence = F.kl_div(own, taught, log_target=True, reduction="batchmean")
    return (1 - hard) * divergence + hard * F.nll_loss(own, targets)


def distillation_loss(
    logits: Tensor, taught: Tensor, targets: Tensor, hard: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(1 - hard) KL(taught || logits) + hard * cross-entropy, fp32 [T], of rows of logits [T, V].

    Returns the gradient of their sum too; it has the shape and dtype of the logits and may reuse
    their memory. If `gradient` is false, the second result is undefined.
    """
    target = targets[:, None]
    own, known = _wide(logits).log_softmax(1), _wide(taught).log_softmax(1)
    wanted = known.exp()
    apart = (wanted * (known - own)).masked_fill_(wanted == 0, 0).sum(1)
    losses = (1 - hard) * apart - hard * own.gather(1, target).squeeze(1)
    if not gradient:
        return losses, logits
    slope = own.exp_().sub_(wanted, alpha=1 - hard)
    slope.scatter_add_(1, target, torch.full_like(target, -hard, dtype=slope.dtype))
    return losses, slope.to(logits.dtype)


# ---- budget projection ----------------------------------------------------------------------


def budget_topk(
    scores: Tensor, costs: Tensor, budget: Tensor, floor: Tensor, tie_rank: Tensor
) -> Tensor:
    """Return the mask [N] of a greedy scan: floors first, then each unit that fits, best first.

    If a unit does not fit, the remaining budget is below its cost and only shrinks: no unit of that
    cost or more can follow. So each round keeps a whole prefix and rules out at least one cost.
    """
    mask = floor.clone()
    left = (budget - costs[floor].sum()).clamp_min(0)
    order = torch.argsort(tie_rank)
    order = order[torch.argsort(score_key(scores)[order], descending=True, stable=True)]
    order = order[~floor[order]]
    while order.numel():
        order = order[costs[order] <= left]
        total = costs[order].cumsum(0)
        fits = total <= left
        taken = order[fits]
        mask[taken] = True
        left = left - costs[taken].sum()
        order = order[~fits]
    return mask


def score_key(scores: Tensor) -> Tensor:
    """Return int64 keys in [0, 2^32) in the order of the fp32 scores: -0 equals +0, NaN lowest."""
    bits = (scores.float() + 0.0).view(torch.int32).long()
    key = torch.where(bits < 0, -1 - (bits + 2**31), bits) + 2**31
    return torch.where(scores.isnan(), 0, key)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
