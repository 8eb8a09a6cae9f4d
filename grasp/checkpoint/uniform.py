"""A model whose layers differ in width as a stock checkpoint: padded with zeros to equal widths.

Zero channels and heads add zeros to the residual stream, so the model computes what it did; it only
gets larger. Pruning with `--layout uniform` pays nothing for the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.checkpoint.hf import as_saved, write_pretrained
from grasp.errors import GraspError
from grasp.run import check_room
from grasp.units import UnitSpace, decoder_layers


def write_uniform(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[str, str]:
    """Pad the model in place and save it in `folder`; returns its class and a note on the cost.

    Raises GraspError: the layers are equal already, or there is no room.
    """
    before = UnitSpace.of(model)
    if all(layer == before.layers[0] for layer in before.layers):
        raise GraspError("every layer has the same widths already: use the checkpoint as it is")
    _pad(model, before)
    after = UnitSpace.of(model)
    target, note = as_saved(model, after)
    needed = sum(p.numel() * p.element_size() for p in target.parameters())
    check_room(folder, "weights need", needed)
    write_pretrained(target, tokenizer, folder, "5GB")
    cost = f"{before.total_params:,} parameters became {after.total_params:,}, padded with zeros"
    return type(target).__name__, f"{cost}; {note}" if note else cost


def _pad(model: PreTrainedModel, space: UnitSpace) -> None:
    """Every layer to the widest FFN and the most KV groups; new units come last."""
    ffn = max(layer.ffn for layer in space.layers)
    groups = max(layer.kv_groups for layer in space.layers)
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        kv_rows = groups * layer.head_dim
        q_rows = kv_rows * layer.group_size
        attention, mlp = modules.attention, modules.mlp
        for linear, rows in (
            (mlp.gate_proj, ffn),
            (mlp.up_proj, ffn),
            (attention.q_proj, q_rows),
            (attention.k_proj, kv_rows),
            (attention.v_proj, kv_rows),
        ):
            _resize(linear, rows, linear.weight.shape[1])
        _resize(mlp.down_proj, space.hidden_size, ffn)
        _resize(attention.o_proj, space.hidden_size, q_rows)


def _resize(linear: Any, rows: int, columns: int) -> None:
    """Add zero rows below and zero columns to the right."""
    below, right = rows - linear.weight.shape[0], columns - linear.weight.shape[1]
    weight = nn.functional.pad(linear.weight.data, (0, right, 0, below))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        bias = nn.functional.pad(linear.bias.data, (0, below))
        linear.bias = nn.Parameter(bias, requires_grad=False)
    linear.out_features, linear.in_features = rows, columns
