"""Argument checks that the public ops share.

A message names the value, what was expected, and the fix.
"""

import torch
from torch import Tensor


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_gate(z: Tensor, size: int, meaning: str, called: str = "z", **tensors: Tensor) -> None:
    """Check that z is a floating [size] on the device of `tensors`, which share one dtype."""
    expect(
        tuple(z.shape) == (size,),
        f"{called} has shape {list(z.shape)}, expected [{size}]: {meaning}",
    )
    (first, lead), *others = tensors.items()
    for name, tensor in (*tensors.items(), (called, z)):
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} is {tensor.dtype}, expected a floating dtype: use {name}.float()"
            )
        expect(
            tensor.device == lead.device,
            f"{name} is on {tensor.device} but {first} is on {lead.device}: move it there",
        )
    for name, tensor in others:
        if tensor.dtype != lead.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but {first} is {lead.dtype}: cast one to the other"
            )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives x, or None: outside of it, fp64 or no floats."""
    kind = x.device.type
    narrows = x.is_floating_point() and x.dtype != torch.float64
    if kind == "meta" or not narrows or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_bound(z: Tensor, max_kept: int) -> None:
    """Check that z has at most max_kept non-zero entries.

    Raises ValueError on CPU. On CUDA this is a device-side assertion: it needs no sync and works in
    a CUDA graph; if it fails, the process can no longer use the GPU.
    """
    count = z.count_nonzero()
    message = f"z has more than {max_kept} non-zero entries, which is what max_kept allows"
    if z.is_cuda:
        torch._assert_async(count <= max_kept, message)
    else:
        expect(bool(count <= max_kept), message)


def span(x: Tensor) -> int:
    """Return the distance in memory from first to last value of one sequence of [B, ...]."""
    return sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
