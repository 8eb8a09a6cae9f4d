"""Scores that keep the same ratio of every module, for criteria that compare only within one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform_ratio(modules: Sequence[Tensor]) -> Tensor:
    """Scores [units] whose one global threshold is the same ratio in every module.

    modules: a criterion's raw scores, one tensor for each FFN and each attention, as UnitSpace
    runs. A unit's score is the part of its module that ranks below it, in (0, 1); equals share one.
    """
    parts = []
    for raw in modules:
        ordered = raw.sort().values
        below, up_to = (torch.searchsorted(ordered, raw, right=right) for right in (False, True))
        parts.append((below + up_to) / (2 * len(raw)))
    return torch.cat(parts)
