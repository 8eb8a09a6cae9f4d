"""The budget projection: keep the best units with a total integer cost within the budget."""

from operator import index
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from grasp_kernels import reference
from grasp_kernels._backend import kernels, runs_triton
from grasp_kernels._checks import expect


class Selection(NamedTuple):
    """The units that a budget keeps, on the device of the scores; nothing is copied to the host."""

    mask: Tensor  # [N] bool, True where kept
    indices: Tensor  # [N] int64: the kept units in ascending order, then the dropped ones
    n_kept: Tensor  # [] int64: indices[:n_kept] are the kept units
    cost: Tensor  # [] int64, total cost of the kept units


def budget_topk(
    scores: Tensor,
    costs: Tensor,
    budget: int | Tensor,
    *,
    floor: Tensor | None = None,
    tie_rank: Tensor | None = None,
) -> Selection:
    """Keep the highest scores within a budget of integer costs.

    This is the projection of GRASPrune (arXiv 2604.19398), except that floors count towards the
    budget and the leftover is filled. The result always equals a sequential greedy scan. Units of
    `floor` are kept, and their cost is reserved first. The others follow by (score descending,
    tie_rank ascending): a unit that still fits is kept; one that does not fit is skipped, and the
    scan continues. A unit of cost 0 is always kept.

    Args:
        scores: [N], any floating dtype; ranked as fp32, -0 equal to +0, NaN lowest.
        costs: [N] integers >= 0.
        budget: an int, or a 0-dim integer tensor on the device of the scores (no host sync).
        floor: [N] bool, units to keep whatever their score. None for no floors.
        tie_rank: [N] integers, a permutation of 0..N-1; equal scores are kept in its order. None
            keeps the lower index first, which favours early layers of a model: pass a random
            permutation if scores start out equal.

    Returns:
        A `Selection`: mask, indices, n_kept and cost.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match. On CPU also for a negative
            cost, a budget below the floors' cost, or a tie_rank that is not a permutation. CUDA
            skips these three checks, because reading values needs a host sync: if the floors exceed
            the budget, only they are kept.
    """
    expect(scores.dim() == 1, f"scores has shape {list(scores.shape)}, expected [N]")
    if not scores.is_floating_point():
        raise TypeError(f"scores is {scores.dtype}, expected a floating dtype: use scores.float()")
    if not isinstance(budget, Tensor):
        if isinstance(budget, bool) or not isinstance(budget, SupportsIndex):
            raise TypeError(f"budget is {budget!r}, expected an int: use int(part * costs.sum())")
        budget = torch.full((), index(budget), dtype=torch.int64, device=scores.device)
    if floor is None:
        floor = torch.zeros_like(scores, dtype=torch.bool)
    if tie_rank is None:
        tie_rank = torch.arange(len(scores), device=scores.device)
    expect(budget.dim() == 0, f"budget has shape {list(budget.shape)}, expected an int or 0-dim")
    for name, tensor in (("costs", costs), ("floor", floor), ("tie_rank", tie_rank)):
        expect(
            tensor.shape == scores.shape,
            f"{name} has shape {list(tensor.shape)}, expected that of scores, {list(scores.shape)}",
        )
    for name, tensor in (("costs", costs), ("tie_rank", tie_rank), ("budget", budget)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} is {tensor.dtype}, expected integers: use {name}.long()")
    if floor.dtype != torch.bool:
        raise TypeError(f"floor is {floor.dtype}, expected torch.bool: use floor.bool()")
    for name, tensor in (("costs", costs), ("floor", floor), ("tie_rank", tie_rank)):
        expect(
            tensor.device == scores.device,
            f"{name} is on {tensor.device} but scores is on {scores.device}: move it there",
        )
    expect(
        budget.device == scores.device,
        f"budget is on {budget.device} but scores is on {scores.device}: pass an int or move it",
    )
    return Selection(*_topk(scores.detach(), costs, budget, floor, tie_rank))


@torch.library.custom_op("grasp::budget_topk", mutates_args=())
def _topk(
    scores: Tensor, costs: Tensor, budget: Tensor, floor: Tensor, tie_rank: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if scores.device.type == "cpu":
        _check_values(costs, budget, floor, tie_rank)
    if scores.dtype == torch.float64:  # no kernel accepts fp64
        scores = scores.float()
    if runs_triton(scores):
        return kernels("projection").budget_topk(scores, costs, budget, floor, tie_rank)
    costs, budget = costs.long(), budget.long()
    mask = reference.budget_topk(scores, costs, budget, floor, tie_rank)
    indices = torch.argsort(~mask, stable=True)
    return mask, indices, mask.sum(), (costs * mask).sum()


def _check_values(costs: Tensor, budget: Tensor, floor: Tensor, tie_rank: Tensor) -> None:
    expect(
        not bool((costs < 0).any()),
        f"costs holds {costs.min() if len(costs) else 0}, expected >= 0",
    )
    reserved = costs.long()[floor].sum()
    expect(
        bool(reserved <= budget),
        f"budget is {budget}, below the {reserved} that the floors cost: raise it or drop floors",
    )
    seen = torch.zeros(len(tie_rank), dtype=torch.bool)
    inside = (tie_rank >= 0) & (tie_rank < len(tie_rank))
    seen[tie_rank[inside].long()] = True
    expect(bool(seen.all()), f"tie_rank is not a permutation of 0..{len(tie_rank) - 1}")


@_topk.register_fake
def _(scores, costs, budget, floor, tie_rank):
    return (
        torch.empty_like(floor),
        floor.new_empty(floor.shape, dtype=torch.int64),
        floor.new_empty((), dtype=torch.int64),
        floor.new_empty((), dtype=torch.int64),
    )
