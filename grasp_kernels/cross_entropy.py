"""Cross-entropy of a frozen linear layer's outputs, in chunks: never all logits at once."""

import torch
from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import autocast_dtype, expect

_CHUNK = 2**25  # logits in memory at one time: 128 MiB in fp32, enough to keep a GPU busy


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean of -log softmax(x weight^T)[target], the loss of a model's frozen head.

    The forward pass also computes the gradient of x, chunk by chunk. So logits are computed once,
    and only some of their rows exist at a time.

    Args:
        x: [T, d], floating.
        weight: [V, d], same dtype, no gradient; as in nn.Linear.
        targets: [T] int64 in 0..V-1.

    Returns:
        fp32 scalar (fp64 for fp64 inputs). The softmax is fp32 whatever the dtype of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match, or the weight requires grad.
    """
    expect(
        not (weight.requires_grad and torch.is_grad_enabled()),
        "weight requires grad, but linear_cross_entropy has no weight gradient: "
        "freeze it (requires_grad_(False)) or use F.cross_entropy",
    )
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    expect(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1],
        f"x {list(x.shape)} and weight {list(weight.shape)} must be [T, d] and [V, d]",
    )
    expect(
        targets.shape == x.shape[:1] and len(x) > 0,
        f"targets has shape {list(targets.shape)}, expected [T] with x {list(x.shape)}, T > 0",
    )
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}, expected one floating dtype")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}, expected torch.int64: use .long()")
    expect(
        x.device == weight.device == targets.device,
        f"x is on {x.device}, weight on {weight.device}, targets on {targets.device}: "
        "move them together",
    )
    rows = max(1, _CHUNK // len(weight))
    if rows > 128:  # whole tiles of a matrix product
        rows -= rows % 128
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    return _loss(x, weight, targets, rows, wants_gradient)[0]


@torch.library.custom_op("grasp::linear_cross_entropy", mutates_args=())
def _loss(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and, if asked for, the gradient [T, d] of the sum; `rows` per chunk."""
    softmax_loss = (kernels("cross_entropy") if runs_triton(x) else reference).softmax_loss
    losses, dx = [], torch.empty_like(x) if gradient else x.new_empty(0)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        loss, d_logits = softmax_loss(x[part] @ weight.T, targets[part], gradient)
        losses.append(loss)
        if gradient:
            torch.mm(d_logits, weight, out=dx[part])
    return torch.cat(losses).mean(), dx


@_loss.register_fake
def _(x, weight, targets, rows, gradient):
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, x.new_empty(x.shape if gradient else (0,))


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _vjp(ctx, grad, _):
    (dx,) = ctx.saved_tensors
    return dx * (grad / len(dx)), None, None, None, None


_loss.register_autograd(_vjp, setup_context=_save)
