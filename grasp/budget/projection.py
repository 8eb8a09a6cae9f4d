"""The projection, which turns scores into a hard mask within the exact budget.

Units are ranked by their fp32 score, ties by a seeded random rank. If widths must be multiples of
m, the channels of a layer are first sorted and cut into blocks of m. A block is ranked by its
middle channel, so that a layer's blocks keep their order and the mask keeps its best channels. In
the uniform layout, the b-th blocks of all layers form one block. `grasp_kernels.budget_topk` then
selects blocks: it keeps the floors, stays within the budget and fills the remainder.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grasp.budget.budget import Budget
from grasp.errors import GraspError, reason
from grasp.model.units import LayerUnits, UnitSpace
from grasp_kernels import budget_topk

MASK_FORMAT = "1"


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """The units to keep: `keep` is bool [units] on the CPU, in the order of UnitSpace."""

    space: UnitSpace
    keep: Tensor

    @classmethod
    def first(cls, space: UnitSpace, after: UnitSpace) -> Mask:
        """The mask that keeps the first units of each kind in each layer, as many as `after`."""
        keep = torch.zeros(space.size, dtype=torch.bool)
        segments = zip(space.segments(), space.expert_segments(), after.layers, strict=True)
        for (_, ffn, kv), (_, experts), layer in segments:
            for units, count in zip(
                (ffn, kv, experts), (layer.ffn, layer.kv_groups, layer.experts), strict=True
            ):
                keep[units.start : units.start + count] = True
        return cls(space, keep)

    def __repr__(self) -> str:
        after = self.pruned_space()
        part = after.prunable_params / self.space.prunable_params
        return f"Mask(keeps {int(self.keep.sum()):,} of {self.space.size:,} units, {part:.2%})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.space == other.space and torch.equal(self.keep, other.keep)

    __hash__ = None  # type: ignore[assignment]

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file: `keep`, and the space as metadata. Raises GraspError."""
        about = {"format": MASK_FORMAT, "space": json.dumps(asdict(self.space))}
        try:
            save_file({"keep": self.keep}, file, metadata=about)
        except (OSError, SafetensorError) as error:
            raise GraspError(f"cannot write {os.fspath(file)}: {reason(error)}") from None

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Mask:
        """Read a mask that `save` wrote. Raises GraspError."""
        try:
            with safe_open(file, framework="pt") as content:
                about = content.metadata()
                if about["format"] != MASK_FORMAT:
                    raise ValueError(f"format {about['format']}")
                values = json.loads(about["space"])
                layers = tuple(LayerUnits(**layer) for layer in values.pop("layers"))
                return cls(UnitSpace(layers=layers, **values), content.get_tensor("keep"))
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise GraspError(f"{os.fspath(file)} is not a mask: {reason(error)}") from None

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Kept indices of each layer: (FFN channels, KV groups), ascending int64."""
        return [
            (self.keep[ffn].nonzero().flatten(), self.keep[kv].nonzero().flatten())
            for _, ffn, kv in self.space.segments()
        ]

    def experts(self) -> list[Tensor]:
        """Kept experts of each layer, ascending int64; empty where the layer has none."""
        return [self.keep[own].nonzero().flatten() for _, own in self.space.expert_segments()]

    def pruned_space(self) -> UnitSpace:
        widths = [(len(ffn), len(kv)) for ffn, kv in self.layers()]
        return self.space.resized(widths, [len(own) for own in self.experts()])

    def digest(self) -> str:
        return sha256(self.keep.numpy().tobytes()).hexdigest()


class Projection:
    """A budget bound to a model's units: `projection(scores)` is the mask within it."""

    def __init__(
        self,
        space: UnitSpace,
        budget: Budget,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        tie_rank: Tensor | None = None,
    ) -> None:
        """`tie_rank`: int [units], the lower of equal scores wins; by default drawn with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        if tie_rank is None:
            tie_rank = torch.randperm(space.size, generator=generator)
        self.space, self.budget = space, budget
        self.limit = budget.limit(space)
        segments = list(budget.segments(space))
        lengths = torch.tensor([s.size for s in segments])
        segment = torch.repeat_interleave(torch.arange(len(segments)), lengths)
        by_tie = tie_rank.argsort()
        by_segment = by_tie[segment[by_tie].argsort(stable=True)]
        self._by_tie = by_tie.to(device)
        self._by_segment = by_segment.to(device)  # then by tie
        self._segment = (segment[by_segment] << 32).to(device)

        # blocks of the sorted units: the middle of the block in each layer that shares it
        middle: list[list[int]] = []
        costs: list[int] = []
        first: list[bool] = []
        blocks_of_kind: list[int] = []
        block_of = torch.empty(space.size, dtype=torch.int64)
        for shared in budget.together(space):
            head = shared[0]
            blocks_of_kind.append(head.size // head.multiple)
            for start in range(0, head.size, head.multiple):
                for s in shared:
                    at = s.units.start + start
                    block_of[at : at + s.multiple] = len(costs)
                middle.append([s.units.start + start + head.multiple // 2 for s in shared])
                costs.append(sum(s.multiple * s.unit_cost for s in shared))
                first.append(start < head.least)
        self._block_of = block_of.to(device)
        most = max(map(len, middle))  # the place after the last unit holds a zero
        padded = [own + [space.size] * (most - len(own)) for own in middle]
        self._middle = torch.tensor(padded, device=device)
        self._shared_by = torch.tensor([len(own) for own in middle], device=device)
        self._costs = torch.tensor(costs, device=device)
        self._floor = torch.tensor(first, device=device)
        # ties: random between kinds; in order within a kind, whose blocks are adjacent
        lowest = torch.stack([tie_rank[own].amin() for own in middle])
        block_tie = torch.cat([part.sort().values for part in lowest.split(blocks_of_kind)])
        self._block_tie = block_tie.argsort().argsort().to(device)  # as ranks 0, 1, 2, ...

    def __call__(self, scores: Tensor, limit: int | Tensor | None = None) -> Tensor:
        """Hard mask, bool [units]. `limit` (int or 0-dim int64) replaces the budget's own."""
        scores = scores.detach().float().nan_to_num(nan=-torch.inf) + 0.0  # -0 becomes 0
        # one sort by (segment, score): the float's bits as an ordered integer, segments 2^32 apart
        bits = scores[self._by_segment].view(torch.int32)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = self._by_segment[(self._segment - key).argsort(stable=True)]
        middles = F.pad(scores[order], (0, 1))[self._middle]
        blocks = budget_topk(
            middles.sum(1) / self._shared_by,
            self._costs,
            self.limit if limit is None else limit,
            floor=self._floor,
            tie_rank=self._block_tie,
        )
        mask = torch.empty_like(scores, dtype=torch.bool)
        mask[order] = blocks.mask[self._block_of]
        return mask

    def ranked(self, importance: Tensor) -> Tensor:
        """Scores in [-1, 1], evenly spaced in the order of `importance`, ties by `tie_rank`."""
        best_first = self._by_tie[importance[self._by_tie].argsort(descending=True, stable=True)]
        scores = torch.empty_like(importance)
        scores[best_first] = torch.linspace(1, -1, len(scores), device=scores.device)
        return scores

    def mask(self, scores: Tensor) -> Mask:
        return Mask(self.space, self(scores).cpu())


def project(
    scores: Tensor,
    units: UnitSpace,
    *,
    keep: float | None = None,
    params: float | None = None,
    kv_cache: float | None = None,
    seed: int = 0,
    **widths: Any,
) -> Mask:
    """The mask that keeps the highest `scores`, fp32 [units.size], within an exact budget.

    The budget is one of `keep` (0.5 by default), `params` and `kv_cache`; `widths` are its
    `ffn_multiple`, `kv_multiple` and `layout` (see `Budget`). Ties are broken by `seed`. Raises
    GraspError: an impossible budget, or scores that are not one finite number per unit.
    """
    if scores.shape != (units.size,) or not scores.isfinite().all():
        raise GraspError(
            f"scores have shape {list(scores.shape)}, expected [{units.size}]: one finite number "
            "per unit"
        )
    budget = Budget.of(keep=keep, params=params, kv_cache=kv_cache, **widths)
    return Projection(units, budget, seed=seed, device=scores.device).mask(scores)
