"""What the kernel tests share: masks, the accuracy rule, and the sequential greedy selection."""

import math
import os
from collections.abc import Callable

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
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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
    leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    for x in leaves:
        x.requires_grad_()
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_accurate(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    names: list[str],
    z: Tensor,
    spread: int = 1,
) -> None:
    """Output and every gradient against fp64, and not more than twice as far off as plain PyTorch.

    The last input is the gate. Gradients named in `names` are listed in the order of the inputs;
    dz is compared for kept and for dropped units apart. A second run gives the same bits.
    """
    wide = [x.double() for x in inputs]
    grad = torch.randn_like(plain(*inputs))
    exact = gradients(plain, wide, grad.double())
    ours = gradients(kernel, inputs, grad)
    again = gradients(kernel, inputs, grad)
    theirs = gradients(plain, inputs, grad)
    for name, a, b, c, d in zip(["out", *names], ours, again, theirs, exact, strict=True):
        assert torch.equal(a, b), f"{name} differs between two runs"
        assert a.shape == d.shape and a.dtype == c.dtype, name
        parts = [slice(None)] if name != "dz" else [z != 0, z == 0]
        for part in parts:
            _assert_close(name, a[part], c[part], d[part], inputs[0].dtype)


def _assert_close(name: str, a: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    scale = exact.norm()
    if a.numel() == 0 or scale < 1e-12:
        assert a.abs().sum() <= _TOLERANCE[dtype], f"{name} should be zero"
        return
    error, allowed = ((x.double() - exact).norm() / scale for x in (a, plain))
    assert math.isfinite(error), f"{name} is not finite"
    # a sum of few units may cancel, and plain PyTorch be far off too
    assert error <= max(_TOLERANCE[dtype], 2 * allowed), f"{name}: relative error {error:.2e}"
    slack = 4 * torch.finfo(dtype).eps  # where plain PyTorch is exact to the last bit
    assert error <= 2 * allowed + slack, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"


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
