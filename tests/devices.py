"""Pretended devices: PyTorch takes cpu:1, cpu:2 and so on for the CPU, and here they are others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

HOST = torch.device("cpu")
GET_DEVICE = torch.Tensor.device.__get__
ACROSS = (torch.Tensor.to, torch.Tensor.copy_, torch._has_compatible_shallow_copy_type)
MOVES = (torch.Tensor.to, torch.Tensor.cpu)
GRADIENTS = (torch.autograd.grad, torch.Tensor.backward)


class PretendedDevices(TorchFunctionMode):
    """Within the context, a storage is where it was moved to, and an op takes those of one device.

    Tensors that were moved nowhere, such as gradients and those of the host, go with all. `used`
    are the devices on which something was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[torch.device] = set()
        self._at: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device:
        found = self._at.get(tensor.untyped_storage()._cdata)  # not given again while it is held
        return found[1] if found and not tensor.is_meta else HOST

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == GET_DEVICE:
            own = self.of(args[0])
            return func(*args) if own == HOST else own
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = [place for x in tensors if (place := self.of(x)) != HOST]
        asked = self._asked(func, args, kwargs)
        if len({*places}) > 1 and func not in (*ACROSS, *GRADIENTS):
            raise AssertionError(f"{func} takes tensors of {sorted(map(str, {*places}))}")
        if func is torch.Tensor.to and asked is not None and places and asked == places[0]:
            args, kwargs = tree_map(lambda x: HOST if _device(x) == asked else x, (args, kwargs))
        out = func(*args, **kwargs)
        if func in GRADIENTS:
            return out
        place = asked or next(iter(places), HOST)
        if func is torch.Tensor.copy_:
            place = self.of(args[0])  # what it writes to stays where it is
        if func in MOVES and place != self.of(args[0]):
            out = out.clone()  # the CPU may have returned what it got
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not x.is_meta and place != HOST:
                storage = x.untyped_storage()
                self._at[storage._cdata] = StorageWeakRef(storage), place
                self.used.add(place)
        return out

    def _asked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call names."""
        if func is torch.Tensor.cpu:
            return HOST
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return self.of(args[1])
        named = [kwargs.get("device"), *(args[1:] if func is torch.Tensor.to else ())]
        return next((place for x in named if (place := _device(x)) is not None), None)


def _device(value: Any) -> torch.device | None:
    if isinstance(value, str) and value.startswith("cpu"):
        return torch.device(value)
    return value if isinstance(value, torch.device) else None
