"""What the stages behind a selection make the pruned model of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grasp.budget.projection import Mask
from grasp.config import PruneConfig


@dataclass(frozen=True, eq=False)
class Chosen:
    """A mask, and what a dense model is pruned with beside it."""

    config: PruneConfig
    mask: Mask
    scales: Tensor | None  # that learned with the gates, as in `Selection`
    blocks: Tensor  # int64 [samples, seq_len]
    teacher: Tensor | None  # `last_hidden` of the dense model on the blocks
