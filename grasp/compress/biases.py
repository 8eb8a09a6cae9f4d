"""Biases that compensate for dropped units on average: W times the mean of their activations.

Source: the bias compensation of FLAP (arXiv 2312.11983), which works with any mask. The means are
those of the dense model. The family's config must allow biases in o_proj and down_proj. Every
projection then gets a bias; the others are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.budget.projection import Mask
from grasp.compress.fold import expand
from grasp.gates.moments import column_moments
from grasp.journal import Journal
from grasp.model.header import SWITCHES
from grasp.model.units import decoder_layers


@torch.no_grad()
def mean_biases(
    model: PreTrainedModel, mask: Mask, blocks: Tensor, journal: Journal
) -> list[Tensor]:
    """The mean that dropped units add to each down_proj and o_proj of the dense model.

    fp32 [hidden] each, layer by layer; blocks: int64 [samples, seq_len].
    """
    columns = iter(column_moments(model, mask.space, blocks, journal))
    biases = []
    for units, (ffn, kv) in zip(mask.space.layers, mask.layers(), strict=True):
        heads = expand(kv, units.group_size * units.head_dim)
        for count, kept in ((units.ffn, ffn), (units.kv_groups, heads)):
            if not count:
                continue
            weight, x, _ = next(columns)
            mean = x.mean.clone()
            mean[kept.to(mean.device)] = 0
            biases.append(weight.float() @ mean)
    return biases


@torch.no_grad()
def add_biases(model: PreTrainedModel, biases: list[Tensor]) -> None:
    """Add the result of `mean_biases` to down_proj and o_proj, in place."""
    model.config.update(dict.fromkeys(SWITCHES, True))
    left = iter(biases)
    for modules in decoder_layers(model):
        for linear in modules.linears:
            if linear.bias is None:
                zeros = linear.weight.new_zeros(len(linear.weight))
                linear.bias = nn.Parameter(zeros, requires_grad=False)
        for linear in modules.outputs:
            linear.bias += next(left).to(linear.bias)
