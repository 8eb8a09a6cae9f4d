"""Greedy Output Approximation: second moment of a unit's contribution to its module's output.

Source: Li, Dong, Lei (arXiv 2407.19126), the second-moment metric of a depth-2 module. Attention:
||O_:j||^2 E[x_j^2], summed over a head, with x the input of o_proj. Gated FFN:
[||D_:j||^2 E[u_j^2]] [||D_:j||^2 E[g_j^2] / 2], with D = down_proj and u, g the outputs of up_proj
and gate_proj. Every module is cut at the same ratio, here by ranks within each module. KV groups
replace heads. Left out: head similarity and recovery before each cut (these are in
greedy_output_approximation.py); the paper also does not prune the blocks at both ends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.gates.moments import Tap, channel_moments
from grasp.journal import Journal
from grasp.model.units import UnitSpace, decoder_layers
from grasp.select.ratio import uniform_ratio


@torch.no_grad()
def output_approximation_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return fp32 [units] in (0, 1) on the model's device; blocks: int64 [samples, seq_len]."""
    taps: list[Tap] = []
    for modules in decoder_layers(model):
        taps += [(modules.up.linear, "output"), (modules.gate.linear, "output")]
        taps += [(modules.attention.o_proj, "input")]
    moments = iter(channel_moments(model, taps, blocks, journal))
    scores = []
    for modules, layer in zip(decoder_layers(model), units.layers, strict=True):
        down, out = (
            linear.weight.float().square().sum(0)
            for linear in (modules.mlp.down_proj, modules.attention.o_proj)
        )
        up, gate, heads = (next(moments).second for _ in range(3))
        up, gate = modules.up.of(up), modules.gate.of(gate)
        scores += [down * up * down * gate / 2]
        scores += [(out * heads).view(layer.kv_groups, -1).sum(1)]
    return uniform_ratio(scores)
