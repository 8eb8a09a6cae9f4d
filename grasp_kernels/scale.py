"""Channel scales, as a separate product or inside the RMSNorm whose output they multiply."""

from types import ModuleType

import torch
from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import check_gate, expect


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Compute x * scale, with both gradients in one pass.

    It trains a scale per channel at one end of a linear layer: W diag(s) or diag(s) W. With g the
    gradient of the output:

        dx       = g * scale
        dscale_j = sum_t g_tj * x_tj

    Args:
        x: [..., C], floating.
        scale: [C], any floating dtype.

    Returns:
        [..., C] in the dtype of x, under autocast too. Arithmetic and the sum over tokens are fp32;
        the result is the same on every run.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match.
    """
    expect(x.dim() > 0, f"x must be [..., C], got {list(x.shape)}")
    width = x.shape[-1]
    check_gate(scale, width, "one scale per channel", "scale", x=x)
    return _scale(x.reshape(-1, width), scale).view(x.shape)


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm (arXiv 1910.07467) with a frozen weight, times a trainable scale.

    With r_t = 1 / sqrt(mean_j x_tj^2 + eps), n = x * r, c = weight * scale and g the gradient of
    the output:

        out      = n * c
        dx       = r * (g * c - n * mean_j(g * c * n))
        dscale_j = weight_j * sum_t g_tj * n_tj

    Only the input and r are saved for backward, not the norm's output or the product.

    Args:
        x: [..., d], floating.
        weight: [d], any floating dtype, no gradient.
        scale: [d], any floating dtype.
        eps: added to the mean square.

    Returns:
        [..., d] in the dtype of x, under autocast too. Arithmetic and the sum over tokens are fp32,
        rounded once; the result is the same on every run.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match, or the weight requires grad.
    """
    expect(
        not (weight.requires_grad and torch.is_grad_enabled()),
        "weight requires grad, but rms_norm_scale has no weight gradient: "
        "freeze it (requires_grad_(False)) or use F.rms_norm and channel_scale",
    )
    expect(x.dim() > 0, f"x must be [..., d], got {list(x.shape)}")
    width = x.shape[-1]
    check_gate(weight, width, "one weight per channel", "weight", x=x)
    check_gate(scale, width, "one scale per channel", "scale", x=x)
    return _norm(x.reshape(-1, width), weight, scale, eps)[0].view(x.shape)


def _serving(x: Tensor) -> ModuleType:
    return kernels("scale") if runs_triton(x) else reference


# ---- registration: scale --------------------------------------------------------------------


@torch.library.custom_op("grasp::channel_scale", mutates_args=())
def _scale(x: Tensor, scale: Tensor) -> Tensor:
    return _serving(x).channel_scale(x, scale).contiguous()


@_scale.register_fake
def _(x, scale):
    return x.new_empty(x.shape)


@torch.library.custom_op("grasp::channel_scale_backward", mutates_args=())
def _scale_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dx, d_scale = _serving(grad).channel_scale_backward(grad, x, scale)
    return dx.contiguous(), d_scale


@_scale_backward.register_fake
def _(grad, x, scale):
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _save_scale(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_scale.register_autograd(
    lambda ctx, grad: _scale_backward(grad, *ctx.saved_tensors), setup_context=_save_scale
)


# ---- registration: norm ---------------------------------------------------------------------


@torch.library.custom_op("grasp::rms_norm_scale", mutates_args=())
def _norm(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, d] -> out [T, d]; for backward r [T], fp32 (fp64 for fp64 inputs)."""
    out, inverse = _serving(x).rms_norm_scale_forward(x, weight, scale, eps)
    return out.contiguous(), inverse


@_norm.register_fake
def _(x, weight, scale, eps):
    inverse = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), inverse


@torch.library.custom_op("grasp::rms_norm_scale_backward", mutates_args=())
def _norm_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    dx, d_scale = _serving(grad).rms_norm_scale_backward(grad, x, inverse, weight, scale)
    return dx.contiguous(), d_scale


@_norm_backward.register_fake
def _(grad, x, inverse, weight, scale):
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _save_norm(ctx, inputs, output):
    x, weight, scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, scale)


def _norm_vjp(ctx, grad, _):
    dx, d_scale = _norm_backward(grad, *ctx.saved_tensors)
    return dx, None, d_scale, None


_norm.register_autograd(_norm_vjp, setup_context=_save_norm)
