"""Wanda-sp: mean over rows of |W_ij| ||X_j||, the weights that a unit's activations meet.

Source: Wanda (arXiv 2306.11695) on whole columns, as FLAP (arXiv 2312.11983) compares with it: on
down_proj by channel and on o_proj summed over a head, at the same ratio in every layer and module.
That ratio is kept, as ranks within each module; heads become KV groups, and X is the dense model's
(the published code takes each layer's from the pruned ones before it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.gates.moments import column_moments
from grasp.journal import Journal
from grasp.model.units import UnitSpace
from grasp.select.ratio import uniform_ratio


@torch.no_grad()
def wanda_sp_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """fp32 [units] on the model's device, in (0, 1); blocks: int64 [samples, seq_len]."""
    return uniform_ratio(
        [
            (weight.float().abs().mean(0) * x.second.sqrt()).view(count, -1).sum(1)
            for weight, x, count in column_moments(model, units, blocks, journal)
        ]
    )
