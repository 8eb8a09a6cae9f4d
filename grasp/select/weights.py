"""What criteria on weights share: the mean over all weights that leave with a unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.units import ATTENTION_NAMES, FFN_COST, FFN_NAMES, UnitSpace, decoder_layers


def prunable_weights(model: PreTrainedModel) -> list[Tensor]:
    """The FFN and attention matrices of all layers."""
    return [
        getattr(module, name).weight
        for layer in decoder_layers(model)
        for module, names in ((layer.mlp, FFN_NAMES), (layer.attention, ATTENTION_NAMES))
        for name in names
    ]


@torch.no_grad()
def unit_means(
    model: PreTrainedModel, space: UnitSpace, value: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean of `value(weight)` over each unit's weights, fp32 [units] on the model's device.

    `value` maps a weight [out, in] to fp32 of its shape. A mean, so that channels and groups
    compare per parameter.
    """
    pieces = []
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        mlp, attention = modules.mlp, modules.attention
        channels = value(mlp.gate_proj.weight).sum(1) + value(mlp.up_proj.weight).sum(1)
        channels = channels + value(mlp.down_proj.weight).sum(0)
        rows = [value(getattr(attention, name).weight).sum(1) for name in ATTENTION_NAMES[:3]]
        rows += [value(attention.o_proj.weight).sum(0)]
        groups = torch.stack([r.view(layer.kv_groups, -1).sum(1) for r in rows]).sum(0)
        pieces += [channels / FFN_COST, groups / layer.kv_cost]
    return torch.cat(pieces) / space.hidden_size
