"""Fold: cut the dropped units out of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.gates.fidelity import check_cut, gated_passes
from grasp.model.classes import as_saved
from grasp.model.experts import RoutedExperts, say_experts
from grasp.model.modeling_grasp import say_channels, say_heads
from grasp.model.units import (
    FFN,
    Attention,
    LayerModules,
    LayerUnits,
    Rows,
    UnitSpace,
    decoder_layers,
)


def fold(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """The units that `mask` keeps, as a dense model of the class that its checkpoint will name.

    `model` is unchanged; the two share the weights that are not cut (embeddings, norms, head).
    Raises GraspError if no class supports these widths.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    cut = copy.deepcopy(model, shared)
    fold_mask(cut, mask)
    return as_saved(cut, UnitSpace.of(cut))[0]


def check_fold(model: PreTrainedModel, mask: Mask, ids: Tensor) -> float:
    """Check that folding `mask` computes what its gates do, on copies of the layers that it cuts.

    ids: int64 [1, seq_len]. Returns the largest relative error. Raises GraspError with the first
    module that differs, or what the model's own code says.
    """
    want = gated_passes(model, mask, ids)
    layers: Any = model.get_decoder().layers
    whole = list(layers)
    try:
        for index, (before, after) in enumerate(
            zip(mask.space.layers, mask.pruned_space().layers, strict=True)
        ):
            if before != after:
                layers[index] = copy.deepcopy(whole[index])
        fold_mask(model, mask)
        return check_cut(model, want, ids)
    finally:
        for index, layer in enumerate(whole):
            layers[index] = layer


@torch.no_grad()
def fold_mask(model: PreTrainedModel, mask: Mask) -> None:
    """Slice the model in place to the kept units: dense, with its own widths in each layer."""
    for layer in kept_in(model, mask):
        fold_layer(*layer)


def kept_in(
    model: PreTrainedModel, mask: Mask
) -> Iterator[tuple[LayerModules, LayerUnits, tuple[Tensor, Tensor], Tensor]]:
    """Each layer with its units and what is kept of them, as `fold_layer` takes them."""
    return zip(decoder_layers(model), mask.space.layers, mask.layers(), mask.experts(), strict=True)


def fold_layer(
    modules: LayerModules, units: LayerUnits, kept: tuple[Tensor, Tensor], experts: Tensor
) -> None:
    """Slice one layer in place; `kept` are indices of channels and of KV groups."""
    ffn, kv = kept
    if modules.ffn is not None and len(ffn) < units.ffn:
        _keep_channels(modules.ffn, ffn)
    if modules.attention is not None and len(kv) < units.kv_groups:
        _keep_groups(modules.attention, kv, units)
    if modules.routed is not None and len(experts) < units.experts:
        _keep_experts(modules.routed, experts)


def _keep_channels(ffn: FFN, kept: Tensor) -> None:
    kept = kept.to(ffn.down.weight.device)
    _keep_rows({ffn.gate: kept, ffn.up: kept})
    _keep_columns(ffn.down, kept)
    say_channels(ffn.module, len(kept))


def _keep_groups(attention: Attention, kept: Tensor, units: LayerUnits) -> None:
    kept = kept.to(attention.out.weight.device)
    heads = expand(kept, units.group_size)
    q_rows, kv_rows = expand(heads, units.head_dim), expand(kept, units.head_dim)
    _keep_rows({attention.q: q_rows, attention.k: kv_rows, attention.v: kv_rows})
    _keep_columns(attention.out, q_rows)
    say_heads(attention.module, len(heads), len(kept))


def _keep_experts(routed: RoutedExperts, kept: Tensor) -> None:
    """Keep the first dimension's entries `kept` of all values that experts and router have."""
    kept = kept.to(routed.router.weight.device)
    for module in (routed.experts, routed.router):
        for name, parameter in module.named_parameters():
            setattr(module, name, _frozen(parameter[kept]))
        for name, buffer in module.named_buffers():
            setattr(module, name, buffer[kept])
    say_experts(routed, len(kept))


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


def _keep_columns(linear: Any, columns: Tensor) -> None:
    linear.weight = _frozen(linear.weight[:, columns])
    linear.in_features = len(columns)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
