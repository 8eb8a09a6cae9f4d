"""Shared by criteria on weights: the mean over all weights that are removed with a unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.model.units import FFN_COST, Rows, UnitSpace, decoder_layers


def prunable_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return the FFN and attention matrices of all layers."""
    return [linear.weight for layer in decoder_layers(model) for linear in layer.linears]


@torch.no_grad()
def unit_means(
    model: PreTrainedModel, space: UnitSpace, value: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the mean of `value(weight)` per unit, fp32 [units] on the model's device.

    `value` maps a weight [out, in] to fp32 of the same shape. A mean lets channels and groups
    compete per parameter.
    """

    def rows(projection: Rows) -> Tensor:
        return projection.of(value(projection.linear.weight).sum(1))

    pieces = []
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        channels = rows(modules.gate) + rows(modules.up)
        channels = channels + value(modules.mlp.down_proj.weight).sum(0)
        heads = [rows(projection) for projection in (modules.q, modules.k, modules.v)]
        heads += [value(modules.attention.o_proj.weight).sum(0)]
        groups = torch.stack([h.view(layer.kv_groups, -1).sum(1) for h in heads]).sum(0)
        pieces += [channels / FFN_COST, groups / layer.kv_cost]
    return torch.cat(pieces) / space.hidden_size
