"""Gated SwiGLU: the element-wise op, and the whole FFN, which computes only what the mask needs."""

from types import ModuleType

import torch
from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import autocast_dtype, check_bound, check_gate, expect

# Above this kept fraction the saved matrix work no longer pays for the copies.
_COMPACT_BELOW = 0.9
_ALIGNMENT = 64  # channels: an odd leading dimension keeps cuBLAS from its fast kernels


def gated_swiglu(gate_pre: Tensor, up: Tensor, z: Tensor) -> Tensor:
    """Compute silu(gate_pre) * up * z, with all three gradients in one pass.

    z holds the FFN channel gates of GRASPrune (arXiv 2604.19398). With a = gate_pre, u = up,
    s = silu(a) and dh the gradient of the output:

        d_gate_pre = dh * z * u * silu'(a)
        d_up       = dh * z * s
        dz_j       = sum_t dh_tj * s_tj * u_tj

    dz is exact for channels with z = 0 too, so training can bring a dropped channel back.

    Args:
        gate_pre: [..., F], floating: the gate projection before silu.
        up: [..., F], same shape and dtype.
        z: [F], any floating dtype; 0/1 or any scale.

    Returns:
        [..., F] in the dtype of gate_pre. Arithmetic and the sum over tokens are fp32; the result
        is the same on every run.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match.
    """
    dtype = autocast_dtype(gate_pre)
    if dtype is not None:
        gate_pre, up = gate_pre.to(dtype), up.to(dtype)
    expect(gate_pre.dim() > 0, f"gate_pre must be [..., F], got {list(gate_pre.shape)}")
    expect(
        up.shape == gate_pre.shape,
        f"up has shape {list(up.shape)}, expected that of gate_pre, {list(gate_pre.shape)}",
    )
    check_gate(z, gate_pre.shape[-1], "one gate per channel", gate_pre=gate_pre, up=up)
    width = gate_pre.shape[-1]
    return _swiglu(gate_pre.reshape(-1, width), up.reshape(-1, width), z).view(gate_pre.shape)


def gated_swiglu_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    z: Tensor,
    *,
    max_kept: int | None = None,
) -> Tensor:
    """Compute the whole gated FFN with frozen weights: ((silu(x Wg^T) * (x Wu^T)) * z) Wd^T.

    The work depends on the mask. The down projection and da, du, dx run only over channels with
    z != 0 (and up to 63 others, so that widths are multiples of 64). dh and dz run over all
    channels, since the straight-through gates of GRASPrune (arXiv 2604.19398) need dz of dropped
    channels too. For backward, kept channels save gate_pre and up, and dropped ones only
    silu(gate_pre) * up; x is not saved.

    Args:
        x: [..., d], floating.
        w_gate, w_up: [F, d]; w_down: [d, F]; as in nn.Linear, same dtype as x, no gradient. If
            w_down is stored as [F, d] (w.t().contiguous().t()), its channels are read as rows,
            which is faster on CUDA.
        z: [F], any floating dtype; 0/1 or any scale.
        max_kept: an upper bound on the number of non-zero z. Without it, the op counts them, which
            costs one host sync per call on CUDA. If z has more, the op raises ValueError on CPU and
            fails a device-side assertion on CUDA.

    Returns:
        [..., d] in the dtype of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match, or a weight requires grad.
    """
    for name, w in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
        expect(
            not (w.requires_grad and torch.is_grad_enabled()),
            f"{name} requires grad, but gated_swiglu_ffn has no weight gradients: "
            "freeze it (requires_grad_(False)) or use gated_swiglu between linear layers",
        )
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w_gate, w_up, w_down = (t.to(dtype) for t in (x, w_gate, w_up, w_down))
    expect(
        w_gate.dim() == 2 and x.dim() > 0 and x.shape[-1] == w_gate.shape[1],
        f"x {list(x.shape)} and w_gate {list(w_gate.shape)} must be [..., d] and [F, d]",
    )
    width, size = w_gate.shape
    expect(
        w_up.shape == w_gate.shape,
        f"w_up has shape {list(w_up.shape)}, expected that of w_gate, [{width}, {size}]",
    )
    expect(
        tuple(w_down.shape) == (size, width),
        f"w_down has shape {list(w_down.shape)}, expected [d, F] = [{size}, {width}]",
    )
    expect(
        max_kept is None or 0 <= max_kept <= width,
        f"max_kept is {max_kept}, expected 0 to {width}",
    )
    check_gate(z, width, "one gate per channel", x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    flat = x.reshape(-1, size)
    return _ffn(flat, w_gate, w_up, w_down, z, max_kept)[0].view(x.shape)


def _serving(x: Tensor) -> ModuleType:
    return kernels("swiglu") if runs_triton(x) else reference


# ---- registration: element-wise -------------------------------------------------------------


@torch.library.custom_op("grasp::gated_swiglu", mutates_args=())
def _swiglu(gate_pre: Tensor, up: Tensor, z: Tensor) -> Tensor:
    return _serving(gate_pre).gated_swiglu(gate_pre, up, z).contiguous()


@_swiglu.register_fake
def _(gate_pre, up, z):
    return gate_pre.new_empty(gate_pre.shape)


@torch.library.custom_op("grasp::gated_swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad: Tensor, gate_pre: Tensor, up: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_gate, d_up, dz = _serving(grad).swiglu_backward(grad, gate_pre, up, z)
    return d_gate.contiguous(), d_up.contiguous(), dz


@_swiglu_backward.register_fake
def _(grad, gate_pre, up, z):
    return gate_pre.new_empty(gate_pre.shape), up.new_empty(up.shape), z.new_empty(z.shape)


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(
    lambda ctx, grad: _swiglu_backward(grad, *ctx.saved_tensors), setup_context=_save_swiglu
)


# ---- registration: FFN ----------------------------------------------------------------------


@torch.library.custom_op("grasp::gated_swiglu_ffn", mutates_args=())
def _ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, z: Tensor, max_kept: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, d] -> y [T, d]; for backward: gate_pre, up [T, k], dropped [T, F - k], order [F]."""
    kept = _kept(z, max_kept)
    if kept == len(z):
        order = torch.arange(len(z), device=z.device)
    else:
        order = torch.argsort(z == 0, stable=True)  # kept channels first
    pack = _serving(x).swiglu_pack
    hidden, gate_pre, up, dropped = pack(x @ w_gate.T, x @ w_up.T, z, order, kept)
    w_kept = w_down if kept == len(z) else _columns(w_down, order[:kept])
    return hidden @ w_kept.T, gate_pre, up, dropped, order


def _kept(z: Tensor, max_kept: int | None) -> int:
    """Return the number of channels to compute; syncs with a GPU only if no bound is given."""
    if max_kept is None:
        return _computed(int(z.count_nonzero()), len(z))
    if max_kept < len(z):
        check_bound(z, max_kept)
    return _computed(max_kept, len(z))


def _columns(w: Tensor, index: Tensor) -> Tensor:
    """Return w[:, index], copied as rows if w is stored by columns."""
    return w.T.index_select(0, index).T if w.stride(0) == 1 else w.index_select(1, index)


def _computed(kept: int, width: int) -> int:
    """Round `kept` up to an aligned number of channels; the extra ones have gates of 0."""
    aligned = -(-kept // _ALIGNMENT) * _ALIGNMENT
    return aligned if aligned < _COMPACT_BELOW * width else width


@_ffn.register_fake
def _(x, w_gate, w_up, w_down, z, max_kept):
    tokens, width = x.shape[0], z.shape[0]
    if max_kept is None:
        kept = torch.library.get_ctx().new_dynamic_size()
    else:
        kept = _computed(max_kept, width)
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens, kept),
        x.new_empty(tokens, kept),
        x.new_empty(tokens, width - kept),
        z.new_empty(width, dtype=torch.int64),
    )


@torch.library.custom_op("grasp::gated_swiglu_ffn_backward", mutates_args=())
def _ffn_backward(
    grad: Tensor,
    gate_pre: Tensor,
    up: Tensor,
    dropped: Tensor,
    order: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    pack_backward = _serving(grad).swiglu_pack_backward
    d_hidden, dz = pack_backward(grad @ w_down, gate_pre, up, dropped, z, order)
    kept = gate_pre.shape[1]
    if kept < len(z):
        w_gate, w_up = (w.index_select(0, order[:kept]) for w in (w_gate, w_up))
    d_gate, d_up = d_hidden[:, :kept], d_hidden[:, kept:]
    return torch.addmm(d_gate @ w_gate, d_up, w_up), dz


@_ffn_backward.register_fake
def _(grad, gate_pre, up, dropped, order, w_gate, w_up, w_down, z):
    return grad.new_empty(grad.shape), z.new_empty(z.shape)


def _save_ffn(ctx, inputs, output):
    _, w_gate, w_up, w_down, z, _ = inputs
    _, gate_pre, up, dropped, order = output
    ctx.mark_non_differentiable(gate_pre, up, dropped, order)
    ctx.save_for_backward(gate_pre, up, dropped, order, w_gate, w_up, w_down, z)


def _ffn_vjp(ctx, grad, *_):
    dx, dz = _ffn_backward(grad, *ctx.saved_tensors)
    return dx, None, None, None, dz, None


_ffn.register_autograd(_ffn_vjp, setup_context=_save_ffn)
