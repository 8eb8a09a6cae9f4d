"""Write a model with layers of different widths as a stock checkpoint, padded to equal widths.

The padding is zeros. Zero channels and heads add zeros to the residual stream, so the outputs stay
the same and the model only gets larger. Pruning with `--layout uniform` avoids this cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.checkpoint.probe import Probe
from grasp.checkpoint.save import write_pretrained
from grasp.checkpoint.verify import check_exported
from grasp.errors import GraspError
from grasp.machine import check_room, readable
from grasp.model.classes import as_saved
from grasp.model.load import environment, load_model, move
from grasp.model.units import Rows, UnitSpace, decoder_layers


def write_uniform(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[str, str]:
    """Pad the model in place and save it in `folder`; return its class and a note on the cost.

    The model cannot be used afterwards. Raises GraspError if all layers have equal widths already,
    the disk is full, or the model read back from `folder` gives other outputs.
    """
    before = UnitSpace.of(model)
    if before.is_uniform:
        raise GraspError("every layer has the same widths already: use the checkpoint as it is")
    probe = Probe.of(model, tokenizer, environment(model.device))
    _pad(model, before)
    after = UnitSpace.of(model)
    target, note = as_saved(model, after, stock_only=True)
    needed = sum(p.numel() * p.element_size() for p in target.parameters())
    check_room(folder, "weights need", needed)
    write_pretrained(target, tokenizer, folder)
    readable(folder)
    architecture = type(target).__name__
    del target
    move(model, "meta")  # frees its memory for the model that is read back
    check_exported(folder, *load_model(folder, dtype=None), probe)
    cost = f"{before.total_params:,} parameters became {after.total_params:,}, padded with zeros"
    return architecture, f"{cost}; {note}" if note else cost


def _pad(model: PreTrainedModel, space: UnitSpace) -> None:
    """Pad every layer to the widest FFN and the most KV groups; new units come last."""
    ffn = max(layer.ffn for layer in space.layers)
    groups = max(layer.kv_groups for layer in space.layers)
    for modules, layer in zip(decoder_layers(model), space.layers, strict=True):
        if (own := modules.ffn) is not None:
            _add_rows({own.gate: ffn, own.up: ffn})
            _add_columns(own.down, ffn)
        if (attention := modules.attention) is not None:
            kv_rows = groups * layer.head_dim
            q_rows = kv_rows * layer.group_size
            _add_rows({attention.q: q_rows, attention.k: kv_rows, attention.v: kv_rows})
            _add_columns(attention.out, q_rows)


def _add_rows(sizes: dict[Rows, int]) -> None:
    """Add zero rows below each projection, up to its new size, within its linear layer."""
    below: dict[Any, list[tuple[Rows, int]]] = {}
    for rows, size in sizes.items():
        below.setdefault(rows.linear, []).append((rows, size - rows.size))
    for linear, parts in below.items():
        weight = torch.cat([pad(rows.weight, (0, 0, 0, zeros)) for rows, zeros in parts])
        if linear.bias is not None:
            bias = torch.cat([pad(rows.bias, (0, zeros)) for rows, zeros in parts])
            linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.out_features = len(weight)


def _add_columns(linear: Any, columns: int) -> None:
    wider = pad(linear.weight, (0, columns - linear.weight.shape[1]))
    linear.weight = nn.Parameter(wider, requires_grad=False)
    linear.in_features = columns
