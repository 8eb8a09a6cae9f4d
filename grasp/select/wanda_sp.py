"""Wanda-sp: mean over rows of |W_ij| ||X_j||, a unit's weights times the norm of their input.

Source: Wanda (arXiv 2306.11695) on whole columns, the baseline in FLAP (arXiv 2312.11983): per
channel on down_proj and summed over a head on o_proj, at the same ratio in every layer and module.
Here ranks within each module keep that ratio, and KV groups replace heads. X comes from the dense
model (the published code takes it from the pruned layers before).
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
    """Return fp32 [units] in (0, 1) on the model's device; blocks: int64 [samples, seq_len]."""
    return uniform_ratio(
        [
            (weight.float().abs().mean(0) * x.second.sqrt()).view(count, -1).sum(1)
            for weight, x, count in column_moments(model, units, blocks, journal)
        ]
    )
