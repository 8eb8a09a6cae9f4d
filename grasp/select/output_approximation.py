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
from torch import Tensor, nn
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
        if modules.ffn is not None:
            taps += [(modules.ffn.up.linear, "output"), (modules.ffn.gate.linear, "output")]
        if modules.attention is not None:
            taps += [(modules.attention.out, "input")]
    moments = iter(channel_moments(model, taps, blocks, journal))
    scores = []
    for modules, layer in zip(decoder_layers(model), units.layers, strict=True):
        if modules.ffn is not None:
            up = modules.ffn.up.of(next(moments).second)
            gate = modules.ffn.gate.of(next(moments).second)
            down = column_norms(modules.ffn.down)
            scores += [down * up * down * gate / 2]
        if modules.attention is not None:
            added = column_norms(modules.attention.out) * next(moments).second
            scores += [added.view(layer.kv_groups, -1).sum(1)]
    return uniform_ratio(scores)


def column_norms(linear: nn.Linear) -> Tensor:
    """Squared norms of the columns: fp32 [in]."""
    return linear.weight.float().square().sum(0)
