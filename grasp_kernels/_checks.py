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
