"""Random scores: the baseline that every criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp.config import PruneConfig
from grasp.model.units import UnitSpace


def random_scores(units: UnitSpace, config: PruneConfig) -> Tensor:
    """Draw fp32 [units] in [0, 1) on the CPU, so that a seed gives the same on every device."""
    return torch.rand(units.size, generator=torch.Generator().manual_seed(config.seed))
