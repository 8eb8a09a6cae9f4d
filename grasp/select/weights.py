"""Shared by criteria on weights: the mean over all weights that are removed with a unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.model.places import joined
from grasp.model.units import FFN_COST, Rows, UnitSpace, decoder_layers


def prunable_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return the FFN, attention and router matrices of all layers."""
    layers = decoder_layers(model)
    weights = [linear.weight for layer in layers for linear in layer.linears]
    return weights + [w for layer in layers if layer.routed for w in layer.routed.matrices]


@torch.no_grad()
def unit_means(
    model: PreTrainedModel, space: UnitSpace, value: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the mean of `value(weight)` per unit, fp32 [units] on the model's device.

    `value` maps a weight [out, in], or [experts, ...], to fp32 of the same shape. A mean lets all
    units compete per parameter.
    """

    def rows(projection: Rows) -> Tensor:
        return projection.of(value(projection.linear.weight).sum(1))

    pieces = []
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        if (ffn := modules.ffn) is not None:
            channels = rows(ffn.gate) + rows(ffn.up) + value(ffn.down.weight).sum(0)
            pieces += [channels / FFN_COST]
        if (attention := modules.attention) is not None:
            heads = [rows(projection) for projection in (attention.q, attention.k, attention.v)]
            heads += [value(attention.out.weight).sum(0)]
            groups = torch.stack([h.view(layer.kv_groups, -1).sum(1) for h in heads]).sum(0)
            pieces += [groups / layer.kv_cost]
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        if (routed := modules.routed) is not None:
            parts = [value(weight).flatten(1).sum(1) for weight in routed.matrices]
            pieces += [torch.stack(parts).sum(0) / layer.expert_cost]
    return joined(pieces) / space.hidden_size
