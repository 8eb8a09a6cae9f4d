"""The projection: scores in, hard mask under the exact budget out.

Units are ranked by their fp32 score, ties by a seeded random rank. Where widths are held to a
multiple m, a layer's channels are first sorted and cut into blocks of m; a block is ranked by its
middle channel, so a layer's blocks keep their order and the mask is always a layer's best channels.
In the uniform layout the b-th blocks of all layers form one block. What is ranked then goes to
`grasp_kernels.budget_topk`, which holds the floors and the budget and fills what is left over.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from grasp.budget.budget import Budget
from grasp.model.units import UnitSpace
from grasp_kernels import budget_topk


@dataclass(frozen=True, eq=False)
class Mask:
    """Which units stay: `keep` is bool [units] on the CPU, in the order of UnitSpace."""

    space: UnitSpace
    keep: Tensor

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Kept indices of each layer: (FFN channels, KV groups), ascending int64."""
        return [
            (self.keep[ffn].nonzero().flatten(), self.keep[kv].nonzero().flatten())
            for _, ffn, kv in self.space.segments()
        ]

    def pruned_space(self) -> UnitSpace:
        return self.space.resized([(len(ffn), len(kv)) for ffn, kv in self.layers()])

    def digest(self) -> str:
        return sha256(self.keep.numpy().tobytes()).hexdigest()


class Projection:
    """A budget bound to a model's units: `projection(scores)` is the mask that it buys."""

    def __init__(
        self,
        space: UnitSpace,
        budget: Budget,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        tie_rank: Tensor | None = None,
    ):
        """`tie_rank`: int [units], lower wins among equal scores; default a permutation by seed."""
        generator = torch.Generator().manual_seed(seed)
        if tie_rank is None:
            tie_rank = torch.randperm(space.size, generator=generator)
        self.space, self.budget = space, budget
        self.limit = budget.limit(space)
        segments = list(budget.segments(space))
        together = len(space.layers) if budget.layout == "uniform" else 1
        lengths = torch.tensor([s.units.stop - s.units.start for s in segments])
        segment = torch.repeat_interleave(torch.arange(len(segments)), lengths)
        self._by_tie = tie_rank.argsort().to(device)
        self._segment = segment.to(device)

        # blocks of the sorted units: [blocks, layers that share the block]
        middle: list[list[int]] = []
        costs: list[int] = []
        first: list[bool] = []
        blocks_of_kind: list[int] = []
        block_of = torch.empty(space.size, dtype=torch.int64)
        heads = segments[: len(segments) // together]
        for number, head in enumerate(heads):
            shared = segments[number :: len(heads)]
            blocks_of_kind.append((head.units.stop - head.units.start) // head.multiple)
            for start in range(0, head.units.stop - head.units.start, head.multiple):
                for s in shared:
                    at = s.units.start + start
                    block_of[at : at + s.multiple] = len(costs)
                middle.append([s.units.start + start + head.multiple // 2 for s in shared])
                costs.append(head.multiple * head.unit_cost * together)
                first.append(start == 0)
        self._block_of = block_of.to(device)
        self._middle = torch.tensor(middle, device=device)
        self._costs = torch.tensor(costs, device=device)
        self._floor = torch.tensor(first, device=device)
        # ties: random between kinds, in order within one, whose blocks lie side by side
        lowest = tie_rank[torch.tensor(middle)].amin(1)
        block_tie = torch.cat([part.sort().values for part in lowest.split(blocks_of_kind)])
        self._block_tie = block_tie.argsort().argsort().to(device)  # as ranks 0, 1, 2, ...

    def __call__(self, scores: Tensor, limit: int | Tensor | None = None) -> Tensor:
        """Hard mask, bool [units]. `limit` (int or 0-dim int64) stands in for the budget's own."""
        scores = scores.detach().float().nan_to_num(nan=-torch.inf) + 0.0  # -0 becomes 0
        by_score = self._by_tie[scores[self._by_tie].argsort(descending=True, stable=True)]
        order = by_score[self._segment[by_score].argsort(stable=True)]
        blocks = budget_topk(
            scores[order][self._middle].mean(1),
            self._costs,
            self.limit if limit is None else limit,
            floor=self._floor,
            tie_rank=self._block_tie,
        )
        mask = torch.empty_like(scores, dtype=torch.bool)
        mask[order] = blocks.mask[self._block_of]
        return mask

    def ranked(self, importance: Tensor) -> Tensor:
        """Scores in [-1, 1], evenly spaced in the order of `importance`, ties by their rank."""
        best_first = self._by_tie[importance[self._by_tie].argsort(descending=True, stable=True)]
        scores = torch.empty_like(importance)
        scores[best_first] = torch.linspace(1, -1, len(scores), device=scores.device)
        return scores

    def mask(self, scores: Tensor) -> Mask:
        return Mask(self.space, self(scores).cpu())
