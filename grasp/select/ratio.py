"""Scores that keep the same ratio in every module, for criteria that only rank within a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp.model.places import joined


def uniform_ratio(modules: Sequence[Tensor]) -> Tensor:
    """Turn raw scores into ranks [units], so that one threshold keeps the same ratio everywhere.

    modules: a criterion's raw scores, one tensor per FFN and per attention, in UnitSpace order. A
    unit's score is the fraction of its module that ranks below it, in (0, 1); equal raw scores give
    equal ranks.
    """
    parts = []
    for raw in modules:
        ordered = raw.sort().values
        below, up_to = (torch.searchsorted(ordered, raw, right=right) for right in (False, True))
        parts.append((below + up_to) / (2 * len(raw)))
    return joined(parts)
