"""GRASPrune's selector: learn scores under the hard budget with a straight-through estimator.

Source: arXiv 2604.19398, section 3. Every step projects the scores to a hard mask m. The gates are
z = m + p - stop_grad(p) with p = sigmoid(s / tau), so the forward pass runs the pruned model, and
every unit, kept or dropped, receives dL/ds = dL/dz * p (1 - p) / tau.

Three additions to the paper, each measured in benchmarks/ablation: scores start from the ranked
Fisher values of the gates; the budget shrinks from the whole model to its limit over the first part
of training; and channel scales are trained together with the gates, so that kept units adapt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp import criteria
from grasp.budget.projection import Projection
from grasp.config import GateSite, PruneConfig, ScaleKind
from grasp.gates.scales import scale, scale_count, scaled
from grasp.gates.training import TrainSettings, train_gates
from grasp.journal import Journal
from grasp.select.fisher import fisher_scores
from grasp.select.selection import Selection

TAU = 1.5


@dataclass(frozen=True)
class LearnSettings:
    """Settings of `learn_scores`.

    `anneal` is the fraction of steps over which the budget shrinks (0: always at its limit). With
    `scales` "channel", channel scales are trained together with the gates.
    """

    train: TrainSettings
    anneal: float = 0.5
    gate_site: GateSite = "output"
    scales: ScaleKind = "unit"


def learned(
    model: PreTrainedModel,
    projection: Projection,
    blocks: Tensor,
    config: PruneConfig,
    stage: Callable[[str], Journal],
    teacher: Tensor | None,
) -> Selection:
    """Learn gates under the budget of `projection`, from `config.init_scores`."""
    fisher = criteria.get("fisher").samples
    start = torch.zeros(projection.space.size, device=model.device)
    if config.init_scores == "fisher":
        scores = fisher_scores(model, projection.space, blocks[:fisher], stage("fisher"))
        start = projection.ranked(scores)
    settings = LearnSettings(
        replace(TrainSettings.of(config, config.epochs), schedule="constant"),
        config.anneal,
        config.gate_site,
        config.scales,
    )
    return learn_scores(model, projection, start, blocks, settings, stage("learn"), teacher)


def free(
    model: PreTrainedModel,
    projection: Projection,
    blocks: Tensor,
    config: PruneConfig,
    stage: Callable[[str], Journal],
    teacher: Tensor | None,
) -> Selection:
    """Learn gates with the same gradients, but every unit open and one projection at the end."""
    everything = replace(config.budget, kind="keep", asked=1.0)
    device = str(model.device)
    projection = Projection(projection.space, everything, seed=config.seed, device=device)
    return learned(model, projection, blocks, config, stage, teacher)


def learn_scores(
    model: PreTrainedModel,
    projection: Projection,
    start: Tensor,
    blocks: Tensor,
    settings: LearnSettings,
    journal: Journal,
    teacher: Tensor | None = None,
) -> Selection:
    """Learn scores, starting from `start`, and scales; blocks, teacher: see `train_gates`."""
    space, whole = projection.space, projection.budget.cost(projection.space)
    along = settings.scales == "channel"
    theta = start
    if along:
        scales = scale_count(model, settings.scales)
        theta = torch.cat([start, torch.zeros(scales, device=start.device)])
    mask = torch.ones(space.size, dtype=torch.bool, device=start.device)
    limit = torch.tensor(whole)

    def straight_through(theta: Tensor, progress: Tensor) -> Tensor:
        nonlocal mask, limit
        scores = theta[: space.size]
        limit = annealed(projection.limit, whole, progress, settings.anneal)
        mask = projection(scores, limit)
        p = torch.sigmoid(scores / TAU)
        gates = mask + (p - p.detach())
        if not along:
            return gates
        per_unit, others = scale(theta[space.size :]).tensor_split([space.size])
        return torch.cat([gates * per_unit, others])

    with scaled(model, space, settings.scales, settings.gate_site) as live:
        theta = train_gates(
            model,
            live,
            theta,
            straight_through,
            blocks,
            settings.train,
            journal,
            info=lambda: kept_by_kind(projection, mask, int(limit)),
            scales=len(theta) - space.size,
            teacher=teacher,
        )
    return Selection(theta[: space.size], scale(theta[space.size :]) if along else None)


def annealed(limit: int, whole: int, progress: Tensor, anneal: float) -> Tensor:
    """Return the budget at `progress`, which falls from `whole` to `limit` along a cubic.

    `progress` is an fp64 scalar in [0, 1); the budget reaches `limit` at `anneal`. The result is an
    int64 scalar on the device, so that the host need not wait for it.
    """
    left = (1 - progress / anneal).clamp(min=0) if anneal else torch.zeros_like(progress)
    return limit + ((whole - limit) * left**3).long()


def kept_by_kind(projection: Projection, mask: Tensor, limit: int) -> dict[str, Any]:
    """Count the kept units of each kind; add their cost, the current limit and the total."""
    mask = mask.cpu()
    kept, cost = {"ffn": 0, "kv": 0, "experts": 0}, 0
    for segment in projection.budget.segments(projection.space):
        count = int(mask[segment.units].sum())
        kept[segment.kind] += count
        cost += count * segment.unit_cost
    return {
        **(kept if projection.space.experts else {"ffn": kept["ffn"], "kv": kept["kv"]}),
        "cost": cost,
        "limit": limit,
        "of": projection.budget.cost(projection.space),
    }
