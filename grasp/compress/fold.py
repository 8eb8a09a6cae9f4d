"""Fold: cut the dropped units out of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.model.classes import as_saved
from grasp.model.modeling_grasp import LayerConfig
from grasp.model.units import Rows, UnitSpace, decoder_layers


def fold(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """The units that `mask` keeps, as a dense model of the class that its checkpoint will name.

    `model` is unchanged; the two share the weights that are not cut (embeddings, norms, head).
    Raises GraspError if no class supports these widths.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    cut = copy.deepcopy(model, shared)
    fold_mask(cut, mask)
    return as_saved(cut, UnitSpace.of(cut))[0]


@torch.no_grad()
def fold_mask(model: PreTrainedModel, mask: Mask) -> None:
    """Slice the model in place to the kept units: dense, with its own widths in each layer."""
    layers = zip(decoder_layers(model), mask.space.layers, mask.layers(), strict=True)
    for modules, units, (ffn, kv) in layers:
        device = modules.mlp.down_proj.weight.device
        ffn, kv = ffn.to(device), kv.to(device)
        _keep_rows({modules.gate: ffn, modules.up: ffn})
        _keep_columns(modules.mlp.down_proj, ffn)

        heads = expand(kv, units.group_size)
        q_rows, kv_rows = expand(heads, units.head_dim), expand(kv, units.head_dim)
        _keep_rows({modules.q: q_rows, modules.k: kv_rows, modules.v: kv_rows})
        _keep_columns(modules.attention.o_proj, q_rows)
        _say_heads(modules.attention, len(heads), len(kv))


def expand(index: Tensor, width: int) -> Tensor:
    """Turn indices of blocks of `width` rows into indices of the rows."""
    return (index[:, None] * width + torch.arange(width, device=index.device)).flatten()


def _keep_rows(kept: dict[Rows, Tensor]) -> None:
    """Slice linear layers to the kept rows of their projections, in their order."""
    rows: dict[Any, list[Tensor]] = {}
    for projection, own in kept.items():
        rows.setdefault(projection.linear, []).append(projection.start + own)
    for linear, parts in rows.items():
        index = torch.cat(parts)
        linear.weight = _frozen(linear.weight[index])
        if linear.bias is not None:
            linear.bias = _frozen(linear.bias[index])
        linear.out_features = len(index)


def _say_heads(attention: Any, heads: int, kv_heads: int) -> None:
    """Set the head counts that an attention does not read from its weights."""
    attention.config = LayerConfig(attention.config, num_attention_heads=heads)
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = kv_heads


def _keep_columns(linear: Any, columns: Tensor) -> None:
    linear.weight = _frozen(linear.weight[:, columns])
    linear.in_features = len(columns)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
