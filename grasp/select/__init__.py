"""Selectors: each ends in scores over units; one projection turns any of them into a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.budget.projection import Projection
from grasp.config import REWRITING, PruneConfig
from grasp.gates.training import TrainSettings
from grasp.journal import Journal
from grasp.model.units import UnitSpace
from grasp.select.fisher import fisher_scores
from grasp.select.flap import flap_scores
from grasp.select.greedy_output_approximation import prune_greedily
from grasp.select.learned import Choice, LearnSettings, learn_scores
from grasp.select.magnitude import magnitude_scores
from grasp.select.output_approximation import output_approximation_scores
from grasp.select.taylor import taylor_scores
from grasp.select.wanda_plus_plus import wanda_plus_plus_scores
from grasp.select.wanda_sp import wanda_sp_scores


class Criterion(NamedTuple):
    """Importance of all units in one go: fp32 [units] from (model, units, blocks, journal)."""

    scores: Callable[[PreTrainedModel, UnitSpace, Tensor, Journal], Tensor]
    samples: int | None = None  # blocks that it looks at; None: all


CRITERIA = {
    "fisher": Criterion(fisher_scores, 32),
    "taylor": Criterion(taylor_scores, 10),  # as published: the mean of more gradients nears 0
    "output-approximation": Criterion(output_approximation_scores),
    "flap": Criterion(flap_scores),
    "wanda-sp": Criterion(wanda_sp_scores),
    "wanda++": Criterion(wanda_plus_plus_scores),
    "magnitude": Criterion(lambda model, space, *_: magnitude_scores(model, space), 0),
}


def select(
    model: PreTrainedModel,
    projection: Projection,
    blocks: Tensor,
    config: PruneConfig,
    stage: Callable[[str], Journal],
) -> Choice:
    """The choice of `config.method`; blocks int64 [samples, seq_len].

    Methods in `REWRITING` also fit the weights of `model`, for this budget alone. `stage(name)`
    gives the journal of a stage, so that each can be resumed.
    """
    space = projection.space

    def ranked(name: str) -> Tensor:
        scores, samples = CRITERIA[name]
        return projection.ranked(scores(model, space, blocks[:samples], stage(name)))

    if config.method == "random":
        drawn = torch.rand(space.size, generator=torch.Generator().manual_seed(config.seed))
        return Choice(drawn.to(model.device))
    if config.method in CRITERIA:
        return Choice(ranked(config.method))
    if config.method in REWRITING:
        similar = config.method == "greedy-head-similarity"
        journal = stage(config.method)
        return Choice(prune_greedily(model, projection, blocks, journal, similar_heads=similar))
    equal = torch.zeros(space.size, device=model.device)
    start = ranked("fisher") if config.start == "fisher" else equal
    settings = LearnSettings(
        replace(TrainSettings.of(config, config.epochs), schedule="constant"),
        config.anneal,
        config.gate_site,
        config.scales,
    )
    if config.method == "free":
        # nothing is closed while they learn: the same gradients, one projection
        open_budget = replace(config.budget, kind="keep", asked=1.0)
        projection = Projection(space, open_budget, seed=config.seed, device=config.device)
    return learn_scores(model, projection, start, blocks, settings, stage("learn"))
