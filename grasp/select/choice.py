"""What a selector ends in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """Scores of all units, fp32 [units], and what `fold_scales` takes if scales learned along."""

    scores: Tensor
    scales: Tensor | None = None
