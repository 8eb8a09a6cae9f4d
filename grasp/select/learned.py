"""GRASPrune's selector: scores learn under the hard budget, by a straight-through estimator.

Source: arXiv 2604.19398, section 3. Every step projects the scores to a hard mask m; the gates are
z = m + p - stop_grad(p) with p = sigmoid(s / tau), so the forward pass sees the pruned model and
every unit, dropped ones too, receives dL/ds = dL/dz * p (1 - p) / tau.

Beyond the paper, each measured in benchmarks/ablation: scores start from the ranked Fisher values
of the gates, and the budget shrinks from everything to its limit over the first part of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.config import GateSite
from grasp.gating import gated
from grasp.projection import Projection
from grasp.training import Journal, TrainSettings, train_gates

TAU = 1.5


@dataclass(frozen=True)
class LearnSettings:
    """`anneal` is the part of the steps over which the budget shrinks (0: no such part)."""

    train: TrainSettings
    anneal: float = 0.5
    gate_site: GateSite = "output"


def learn_scores(
    model: PreTrainedModel,
    projection: Projection,
    start: Tensor,
    blocks: Tensor,
    settings: LearnSettings,
    journal: Journal,
) -> Tensor:
    """Learned scores, fp32 [units], from `start` on; blocks int64 [samples, seq_len]."""
    space, whole = projection.space, projection.budget.cost(projection.space)
    mask = torch.ones(space.size, dtype=torch.bool, device=start.device)
    limit = torch.tensor(whole)

    def straight_through(scores: Tensor, progress: Tensor) -> Tensor:
        nonlocal mask, limit
        limit = annealed(projection.limit, whole, progress, settings.anneal)
        mask = projection(scores, limit)
        p = torch.sigmoid(scores / TAU)
        return mask + (p - p.detach())

    with gated(model, space, settings.gate_site) as gates:
        return train_gates(
            model,
            gates,
            start,
            straight_through,
            blocks,
            settings.train,
            journal,
            info=lambda: kept_by_kind(projection, mask, int(limit)),
        )


def annealed(limit: int, whole: int, progress: Tensor, anneal: float) -> Tensor:
    """Budget at `progress`, an fp64 scalar in [0, 1): from `whole` to `limit` along a cubic.

    It reaches `limit` at `anneal`; an int64 scalar on the device, so that no host waits for it.
    """
    left = (1 - progress / anneal).clamp(min=0) if anneal else torch.zeros_like(progress)
    return limit + ((whole - limit) * left**3).long()


def kept_by_kind(projection: Projection, mask: Tensor, limit: int) -> dict[str, Any]:
    """Kept FFN channels and KV groups, and their cost beside the limit in force and the whole."""
    mask = mask.cpu()
    counts = [int(mask[s.units].sum()) for s in projection.budget.segments(projection.space)]
    costs = [s.unit_cost for s in projection.budget.segments(projection.space)]
    return {
        "ffn": sum(counts[::2]),
        "kv": sum(counts[1::2]),
        "cost": sum(n * c for n, c in zip(counts, costs, strict=True)),
        "limit": limit,
        "of": projection.budget.cost(projection.space),
    }
