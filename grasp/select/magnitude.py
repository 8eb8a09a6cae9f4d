"""Magnitude: a unit's mean squared weight. Per weight, so that channels and groups compare."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.units import FFN_COST, UnitSpace, decoder_layers


@torch.no_grad()
def magnitude_scores(model: PreTrainedModel, space: UnitSpace) -> Tensor:
    """fp32 [units] on the model's device."""
    pieces = []
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        mlp, attention = modules.mlp, modules.attention
        channels = sum(_row_squares(m.weight) for m in (mlp.gate_proj, mlp.up_proj))
        channels = channels + _row_squares(mlp.down_proj.weight.T)
        rows = [_row_squares(m.weight) for m in (attention.q_proj, attention.k_proj)]
        rows += [_row_squares(attention.v_proj.weight), _row_squares(attention.o_proj.weight.T)]
        groups = torch.stack([r.view(layer.kv_groups, -1).sum(1) for r in rows]).sum(0)
        pieces += [channels / FFN_COST, groups / layer.kv_cost]
    return torch.cat(pieces) / space.hidden_size


def _row_squares(weight: Tensor) -> Tensor:
    return weight.float().square().sum(1)
