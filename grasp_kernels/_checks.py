"""Argument checks that the public ops share.

A message names the value, what was expected, and the fix.
"""

import torch
from torch import Tensor


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_gate(z: Tensor, size: int, meaning: str, called: str = "z", **tensors: Tensor) -> None:
    """z is a floating [size] on the device of `tensors`, which all share one floating dtype."""
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
    """The dtype that an active autocast region asks for on the device of x, None outside of one."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_bound(z: Tensor, max_kept: int) -> None:
    """z has at most max_kept non-zero entries: a ValueError, or on CUDA an assertion on the device.

    That one needs no sync and holds in a CUDA graph; it ends the process's use of the GPU.
    """
    count = z.count_nonzero()
    message = f"z has more than {max_kept} non-zero entries, which is what max_kept allows"
    if z.is_cuda:
        torch._assert_async(count <= max_kept, message)
    else:
        expect(bool(count <= max_kept), message)


def span(x: Tensor) -> int:
    """Distance in memory between the first and the last value of one sequence of [B, ...]."""
    return sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
