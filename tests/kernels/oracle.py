"""Shared by the kernel tests: masks, the accuracy rule, and the sequential greedy selection."""

import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MASKS = ("zeros", "ones", "one", "random", "scales")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS_RUN = INTERPRETED or torch.cuda.is_available()
# bf16 arithmetic is wrong in the interpreter, so there fp16 stands for half precision.
DTYPES = (
    (torch.float32, torch.float16)
    if INTERPRETED
    else (torch.float32, torch.float16, torch.bfloat16)
)


def mask(kind: str, size: int, device: str = "cpu") -> Tensor:
    z = torch.zeros(size)
    if kind == "ones":
        z = torch.ones(size)
    elif kind == "one":
        z[size // 2] = 1
    elif kind == "random":
        z = (torch.rand(size) < 0.5).float()
    elif kind == "scales":
        z = torch.rand(size) * 2 - 0.5
        z[::3] = 0
    return z.to(device)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of a function, then the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]  # strides stay: no clone
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_accurate(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    names: list[str],
    z: Tensor | None,
    atomic: tuple[str, ...] = (),
) -> None:
    """Output and every gradient against fp64; a second run gives the same bits, but for `atomic`.

    `names` lists the gradients in the order of the inputs. `z` is the last input where that is a
    gate in which the output is linear, else None.
    """
    grad = torch.randn_like(plain(*inputs))
    *wide, wide_grad = (x.double() for x in (*inputs, grad))
    exact = gradients(plain, wide, wide_grad)
    ours = gradients(kernel, inputs, grad)
    again = ours if INTERPRETED else gradients(kernel, inputs, grad)  # NumPy has no races
    theirs = gradients(plain, inputs, grad)
    side = max(n for x in inputs for n in x.shape)
    for name, a, b, c, d in zip(["out", *names], ours, again, theirs, exact, strict=True):
        assert name in atomic or torch.equal(a, b), f"{name} differs between two runs"
        assert a.shape == d.shape and a.dtype == c.dtype, name
        if z is not None and name == names[-1]:
            sums = [(t.norm(), t.count_nonzero()) for t in gate_terms(plain, wide, wide_grad)]
            summed, count = (torch.stack(x) for x in zip(*sums, strict=True))
        else:  # a sum runs over one dimension
            summed, count = d.norm(), side
            if summed < 1e-9 * wide_grad.norm():  # zero, as a difference of numbers like grad's
                summed = wide_grad.norm()
        assert_close(name, a, c, d, summed, count, inputs[0].dtype)


def gate_terms(
    plain: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> Iterator[Tensor]:
    """For each gate the products that its dz sums, with the shape of the output."""
    *rest, z = inputs
    for unit in torch.eye(len(z), dtype=z.dtype, device=z.device):
        yield grad * plain(*rest, unit)


def assert_close(
    name: str,
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    summed: Tensor,
    count: Tensor | int,
    dtype: torch.dtype,
) -> None:
    """Errors relative to what was summed, never to a sum that may cancel.

    `summed` is the norm of the `count` terms of each number, or of the whole tensor. fp32 has
    rounding's own bound; 16 bit has twice the error of plain PyTorch over the whole tensor.
    """
    error, allowed, eps = ours.double() - exact, plain.double() - exact, torch.finfo(dtype).eps
    if dtype == torch.float32:
        error = error.abs() if summed.dim() else error.norm()
        bound = 2 * eps * torch.as_tensor(count).sqrt() * summed
    else:
        error, bound = error.norm(), torch.maximum(2 * allowed.norm(), 2 * eps * summed.norm())
    worst = (error / bound).max()
    assert (error <= bound).all(), f"{name}: {worst:.1f} times what rounding allows"


def greedy(scores: Tensor, costs: Tensor, budget: int, floor: Tensor, tie_rank: Tensor) -> Tensor:
    """The projection as a loop: the truth for every other implementation."""
    value, cost, rank, kept = (x.tolist() for x in (scores.float(), costs, tie_rank, floor))
    left = max(budget - sum(c for c, f in zip(cost, kept, strict=True) if f), 0)
    lowest = [math.isnan(v) for v in value]
    for i in sorted(
        range(len(value)), key=lambda i: (lowest[i], -value[i] if not lowest[i] else 0, rank[i])
    ):
        if not kept[i] and cost[i] <= left:
            kept[i] = True
            left -= cost[i]
    return torch.tensor(kept, dtype=torch.bool)
