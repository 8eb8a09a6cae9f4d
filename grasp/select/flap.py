"""FLAP: Var(X_j) ||W_:j||^2, the part of a column's output that a constant cannot replace.

Source: FLAP (arXiv 2312.11983), metric WIFV, search over all layers and modules (AL-AM): scores of
the columns of each down_proj and o_proj are standardised to mean 0 and deviation 1, a head's score
is the mean over its columns, and one threshold applies to the whole model. Here KV groups replace
heads. FLAP's biases work with any method and are in compress/biases.py. Left out: the published
code first squares the scores of o_proj's columns; the paper does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.gates.moments import column_moments
from grasp.journal import Journal
from grasp.model.places import joined
from grasp.model.units import UnitSpace


@torch.no_grad()
def flap_scores(
    model: PreTrainedModel, units: UnitSpace, blocks: Tensor, journal: Journal
) -> Tensor:
    """Return scores, fp32 [units] on the model's device; blocks: int64 [samples, seq_len]."""
    scores = []
    for weight, x, count in column_moments(model, units, blocks, journal):
        columns = x.var * weight.float().square().sum(0)
        spread = columns.std().clamp(min=torch.finfo(columns.dtype).tiny)
        scores.append(((columns - columns.mean()) / spread).view(count, -1).mean(1))
    return joined(scores)
