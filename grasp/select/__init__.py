"""Selectors: each ends in scores over units; one projection turns any of them into a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.config import PruneConfig
from grasp.projection import Projection
from grasp.select.fisher import fisher_scores
from grasp.select.learned import LearnSettings, learn_scores
from grasp.select.magnitude import magnitude_scores
from grasp.training import Journal, TrainSettings

FISHER_SAMPLES = 32


def select(
    model: PreTrainedModel,
    projection: Projection,
    blocks: Tensor,
    config: PruneConfig,
    stage: Callable[[str], Journal],
) -> Tensor:
    """Scores of all units by `config.method`, fp32 [units]; blocks int64 [samples, seq_len].

    `stage(name)` gives the journal of a stage, so that each can be resumed.
    """
    space = projection.space
    if config.method == "random":
        drawn = torch.rand(space.size, generator=torch.Generator().manual_seed(config.seed))
        return drawn.to(model.device)
    if config.method == "magnitude":
        return magnitude_scores(model, space)
    start = torch.zeros(space.size, device=model.device)
    if config.method == "fisher" or config.start == "fisher":
        fisher = fisher_scores(model, space, blocks[:FISHER_SAMPLES], stage("fisher"))
        start = projection.ranked(fisher)
    if config.method == "fisher":
        return start
    settings = LearnSettings(
        TrainSettings.of(config, config.epochs), config.anneal, config.gate_site
    )
    return learn_scores(model, projection, start, blocks, settings, stage("learn"))
