"""The result of a selector."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Selection(NamedTuple):
    """Scores of all units, fp32 [units], and the scales for `fold_scales` if any were learned."""

    scores: Tensor
    scales: Tensor | None = None
