"""Selectors: each one scores all units; one projection turns the scores into a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp import criteria
from grasp.budget.projection import Projection
from grasp.config import PruneConfig
from grasp.errors import GraspError
from grasp.journal import Journal
from grasp.select.selection import Selection


def select(
    model: PreTrainedModel,
    projection: Projection,
    blocks: Tensor,
    config: PruneConfig,
    stage: Callable[[str], Journal],
    teacher: Tensor | None = None,
) -> Selection:
    """Score all units with the criterion `config.method`; blocks: int64 [samples, seq_len].

    `teacher` is their `last_hidden`, for criteria that learn from the dense model.
    A criterion that updates weights changes `model` in place, for this budget only. `stage(name)`
    returns the journal of a stage, so that each stage can be resumed. Raises GraspError if the
    scores do not fit the model.
    """
    criterion = criteria.get(config.method)
    found = criterion(
        model=model,
        units=projection.space,
        blocks=blocks[: criterion.samples],
        journal=stage(criterion.name),
        projection=projection,
        config=config,
        stage=stage,
        teacher=None if teacher is None else teacher[: criterion.samples],
    )
    if isinstance(found, Selection):
        return found
    size = projection.space.size
    if not isinstance(found, Tensor) or found.shape != (size,) or not found.isfinite().all():
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise GraspError(
            f"method {criterion.name!r} gave {shape}, expected {size} finite scores, one per unit"
        )
    return Selection(projection.ranked(found.to(model.device, torch.float32)))
