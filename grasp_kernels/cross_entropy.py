"""Losses of a frozen linear layer's outputs, in chunks: never all logits at once."""

from collections.abc import Callable

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
    x, weight = _checked("linear_cross_entropy", x, weight, targets)
    return _cross_entropy(x, weight, targets, _rows(weight), _wants_gradient(x))[0]


def linear_distillation(
    x: Tensor, weight: Tensor, teacher: Tensor, targets: Tensor, hard: float = 0.0
) -> Tensor:
    """Compute the mean of (1 - hard) KL(p_teacher || p) + hard * cross-entropy of the targets.

    p is softmax(x weight^T) and p_teacher softmax(teacher weight^T): student and teacher share a
    frozen head, so that the teacher's last hidden states are enough to know its predictions. As in
    `linear_cross_entropy`, only some rows of logits exist at a time.

    Args:
        x: [T, d], floating.
        weight: [V, d], same dtype, no gradient; as in nn.Linear.
        teacher: [T, d], same dtype, no gradient.
        targets: [T] int64 in 0..V-1.
        hard: weight of the cross-entropy, in [0, 1].

    Returns:
        fp32 scalar (fp64 for fp64 inputs). The softmax is fp32 whatever the dtype of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match, the weight or the teacher
            requires grad, or `hard` is out of range.
    """
    expect(
        not (teacher.requires_grad and torch.is_grad_enabled()),
        "teacher requires grad, but linear_distillation has no gradient for it: detach it",
    )
    expect(0 <= hard <= 1, f"hard is {hard}, expected a weight in [0, 1]")
    dtype = autocast_dtype(x)
    teacher = teacher if dtype is None else teacher.to(dtype)
    x, weight = _checked("linear_distillation", x, weight, targets)
    expect(
        teacher.shape == x.shape and teacher.device == x.device,
        f"teacher is {list(teacher.shape)} on {teacher.device}, expected {list(x.shape)} on "
        f"{x.device}, as x",
    )
    if teacher.dtype != x.dtype:
        raise TypeError(f"teacher is {teacher.dtype}, expected {x.dtype}, as x")
    rows = _rows(weight, 2)
    return _distillation(x, weight, teacher, targets, hard, rows, _wants_gradient(x))[0]


def _checked(op: str, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and weight in the dtype of autocast, if it is on. Raises ValueError, TypeError."""
    expect(
        not (weight.requires_grad and torch.is_grad_enabled()),
        f"weight requires grad, but {op} has no weight gradient: "
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
    return x, weight


def _rows(weight: Tensor, kinds: int = 1) -> int:
    """Rows per chunk, if `kinds` of logits are in memory together."""
    rows = max(1, _CHUNK // (kinds * len(weight)))
    return rows - rows % 128 if rows > 128 else rows  # whole tiles of a matrix product


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


@torch.library.custom_op("grasp::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and, if asked for, the gradient [T, d] of the sum; `rows` per chunk."""
    home = kernels("cross_entropy") if runs_triton(x) else reference

    def loss(part: slice) -> tuple[Tensor, Tensor]:
        return home.softmax_loss(x[part] @ weight.T, targets[part], gradient)

    return _in_chunks(loss, x, weight, rows, gradient)


@torch.library.custom_op("grasp::linear_distillation", mutates_args=())
def _distillation(
    x: Tensor,
    weight: Tensor,
    teacher: Tensor,
    targets: Tensor,
    hard: float,
    rows: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As `_cross_entropy`."""
    home = kernels("cross_entropy") if runs_triton(x) else reference

    def loss(part: slice) -> tuple[Tensor, Tensor]:
        logits, taught = x[part] @ weight.T, teacher[part] @ weight.T
        return home.distillation_loss(logits, taught, targets[part], hard, gradient)

    return _in_chunks(loss, x, weight, rows, gradient)


def _in_chunks(
    loss: Callable[[slice], tuple[Tensor, Tensor]],
    x: Tensor,
    weight: Tensor,
    rows: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    losses, dx = [], x.new_empty(x.shape if gradient else 0)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        value, d_logits = loss(part)
        losses.append(value)
        if gradient:
            torch.mm(d_logits, weight, out=dx[part])
    return torch.cat(losses).mean(), dx


@_cross_entropy.register_fake
def _(x, weight, targets, rows, gradient):
    return _fake(x, gradient)


@_distillation.register_fake
def _(x, weight, teacher, targets, hard, rows, gradient):
    return _fake(x, gradient)


def _fake(x, gradient):
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, x.new_empty(x.shape if gradient else (0,))


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.others = len(inputs) - 1


def _vjp(ctx, grad, _):
    (dx,) = ctx.saved_tensors
    return _times(dx, grad / len(dx)), *[None] * ctx.others


@torch.library.custom_op("grasp::loss_vjp", mutates_args=())
def _times(dx: Tensor, factor: Tensor) -> Tensor:
    """dx * factor, without a derivative: dx is a constant here, and depends on x."""
    return dx * factor


@_times.register_fake
def _(dx, factor):
    return torch.empty_like(dx)


_cross_entropy.register_autograd(_vjp, setup_context=_save)
_distillation.register_autograd(_vjp, setup_context=_save)
