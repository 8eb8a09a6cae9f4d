"""Where a model lies: on one device, or its decoder layers over several GPUs of one process.

All but the layers lies on the first device, which is `model.device`, with gates, scales and their
optimiser. A layer moves what it is called with to its own device, and what comes after the layers
moves the hidden states back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.model.units import decoder_of, layers_name

# one device, or that of all but the decoder layers and then that of each layer
Places = str | tuple[str, ...]


def places_of(model: PreTrainedModel) -> Places:
    """Where a model lies."""
    places = tuple(str(device_of(m)) for m in (model, *decoder_of(model).layers))
    return places if len({*places}) > 1 else places[0]


def device_of(module: nn.Module) -> torch.device:
    """The device of a module that lies on one."""
    return next(module.parameters()).device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device; from the host, without waiting for what a GPU still computes."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def device_map(model: PreTrainedModel, places: tuple[str, ...]) -> dict[str, str]:
    """`places` as `from_pretrained` takes them: by the names of modules."""
    prefix = layers_name(model)
    beside = [name for name in model.state_dict() if not name.startswith(f"{prefix}.")]
    own = {f"{prefix}.{index}": place for index, place in enumerate(places[1:])}
    return {name.rpartition(".")[0]: places[0] for name in beside} | own


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor from those of several layers, on the first one's device."""
    return torch.cat([part.to(parts[0].device) for part in parts])


def place(model: Any, places: tuple[str, ...]) -> None:
    """Move all but the decoder layers to the first place, and each layer to its own."""
    remove_hook_from_submodules(model)  # accelerate's, which a copy of the model cannot use
    decoder, first = decoder_of(model), places[0]
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    model.to(first)
    decoder.layers = layers
    for layer, own in zip(layers, places[1:], strict=True):
        layer.to(own)
    for module in (*layers, *(m for m in decoder.children() if m is not layers)):
        here = any(True for _ in module.parameters())
        if here and _follow not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_follow, with_kwargs=True)


def _follow(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Move what a module is called with to where its weights lie."""
    own = device_of(module)

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(own) if isinstance(value, Tensor) else value

    return moved(args), {name: moved(value) for name, value in kwargs.items()}
