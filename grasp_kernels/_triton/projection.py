"""The budget projection by radix selection: no sort, no host sync, exact integers throughout.

Every unit gets an integer sort key: the 32 bits of its score, then its inverted tie rank. A round
finds the first unit, in descending order, that does not fit the budget; it resolves one digit of 8
bits per launch. A launch builds a histogram of costs over the digit. In the next launch, every
block reads from it the digit of that unit and the budget left before it. All units above are kept.

After that, only units cheaper than the one that did not fit can follow, so a second round over them
fills the rest of the budget. With two distinct costs, this completes the projection. With more,
`_fill` continues one unit at a time in a single program; it returns at once if nothing is left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels._triton.launch import config, launch

_DIGIT = 8  # bits


def budget_topk(
    scores: Tensor, costs: Tensor, budget: Tensor, floor: Tensor, tie_rank: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mask, the indices (kept ones first), the number of kept units and their cost."""
    count = len(scores)
    scores, costs, floor, tie_rank = (x.contiguous() for x in (scores, costs, floor, tie_rank))
    tile = config("projection", scores.device)
    blocks = triton.cdiv(count, tile.blocks["BLOCK"])
    rank_bits = max(1, (count - 1).bit_length())
    passes = -(-(32 + rank_bits) // _DIGIT)
    steps = 2 * passes  # two rounds

    def integers(*shape: int, zero: bool = False) -> Tensor:
        make = scores.new_zeros if zero else scores.new_empty
        return make(shape, dtype=torch.int64)

    order = integers(count)
    # Per step: 256 bins, then the prefix and the budget that the step starts from. Last row: the
    # cost of the floors, and the number of remaining units that would fit.
    table = integers(steps + 1, 258, zero=True)
    bounds = integers(2, 2)  # per round: the unit that did not fit, the budget before it
    per_block = integers(2, max(blocks, 1))  # kept number and cost
    mask, indices = torch.empty_like(floor), integers(count)
    n_kept, cost = integers(zero=blocks == 0), integers(zero=blocks == 0)

    grid = (blocks,)
    shared = (order, costs, floor, budget, table, bounds, count)
    constants = {"PASSES": passes, "STEPS": steps}
    launch(_order, grid, tile, scores, tie_rank, *shared, RANK_BITS=rank_bits, **constants)
    for step in range(1, steps):
        launch(_narrow, grid, tile, *shared, step, **constants)
    launch(_mark, grid, tile, *shared, mask, per_block, **constants)
    launch(_fill, (min(blocks, 1),), tile, *shared, mask, per_block, STEPS=steps)
    spread = config("projection_write", scores.device)
    outputs = (indices, n_kept, cost)
    launch(_write, grid, spread, mask, per_block, *outputs, count, BLOCK=tile.blocks["BLOCK"])
    return mask, *outputs


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def _add_costs(row, digit, cost):
    """Add the costs of a block, by digit, to a row of 256 bins.

    A histogram only counts, so each bit of the costs is counted separately, then weighted. Most
    blocks hold FFN channels only, whose cost has two set bits, also at any power-of-two multiple.
    """
    top = tl.max(cost, 0)
    bins = tl.zeros([256], tl.int64)
    bit = 0
    while (top >> bit) > 0:
        has_bit = (cost >> bit) & 1
        if tl.max(has_bit, 0) == 1:
            bins += tl.histogram(digit, 256, mask=has_bit == 1).to(tl.int64) << bit
        bit += 1
    at = tl.arange(0, 256)
    tl.atomic_add(row + at, bins, mask=bins > 0, sem="relaxed")


@triton.jit
def _descend(row, prefix, left):
    """Extend the prefix of a finished step by one digit; return it with the budget left before it.

    If all units of the step fit, the digit is -1. In the first step of a round, the prefix is then
    negative: below every unit.
    """
    at = tl.arange(0, 256)
    bins = tl.load(row + 255 - at)  # highest digit first
    fits = tl.cumsum(bins, 0) <= left
    prefix = prefix * 256 + 255 - tl.sum(fits.to(tl.int64), 0)
    return prefix, left - tl.sum(tl.where(fits, bins, 0), 0)


@triton.jit
def _order(
    scores, tie_rank, order, costs, floor, budget, table, bounds, count,
    RANK_BITS: tl.constexpr, PASSES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    score = tl.load(scores + i, inside, other=0.0).to(tl.float32) + 0.0  # -0 becomes +0
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(bits < 0, -1 - (bits + 2147483648), bits) + 2147483648
    key = tl.where(score == score, key, 0)
    rank = tl.load(tie_rank + i, inside, other=0).to(tl.int64)
    unit = (key << RANK_BITS) + ((1 << RANK_BITS) - 1 - rank)
    tl.store(order + i, unit, inside)

    cost = tl.load(costs + i, inside, other=0).to(tl.int64)
    is_floor = tl.load(floor + i, inside, other=0) != 0
    tl.atomic_add(table + STEPS * 258, tl.sum(tl.where(is_floor, cost, 0), 0), sem="relaxed")
    digit = (unit >> (8 * (PASSES - 1))).to(tl.int32) & 255
    _add_costs(table, digit, tl.where(is_floor, 0, cost))


@triton.jit(do_not_specialize=["step"])
def _narrow(
    order, costs, floor, budget, table, bounds, count, step,
    PASSES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = table + (step - 1) * 258
    if step == 1:
        prefix = tl.zeros([], tl.int64)
        left = tl.maximum(tl.load(budget).to(tl.int64) - tl.load(table + STEPS * 258), 0)
    else:
        prefix = tl.load(row + 256)
        left = tl.load(row + 257)
    prefix, left = _descend(row, prefix, left)
    bound = tl.full([], 9223372036854775807, tl.int64)  # in the first round all units take part
    most = bound
    if step >= PASSES:
        at = bounds + 2 * (step // PASSES - 1)
        if step % PASSES == 0:  # a round begins after the unit that did not fit
            bound = prefix
            most = left
            prefix = tl.zeros([], tl.int64)
            if tl.program_id(0) == 0:
                tl.store(at, bound)
                tl.store(at + 1, most)
        else:
            bound = tl.load(at)
            most = tl.load(at + 1)
    row += 258
    if tl.program_id(0) == 0:
        tl.store(row + 256, prefix)
        tl.store(row + 257, left)

    if prefix >= 0:  # else all units of the round fit: nothing is left to find
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        unit = tl.load(order + i, i < count, other=-1)
        shift = 8 * (PASSES - 1 - step % PASSES)
        counts = (i < count) & (unit < bound) & (unit >> (shift + 8) == prefix)
        if tl.max(counts.to(tl.int32), 0) > 0:
            cost = tl.load(costs + i, counts, other=0).to(tl.int64)
            is_floor = tl.load(floor + i, counts, other=1) != 0
            cost = tl.where(is_floor | (cost > most), 0, cost)
            _add_costs(row, (unit >> shift).to(tl.int32) & 255, cost)


@triton.jit
def _mark(
    order, costs, floor, budget, table, bounds, count, mask, per_block,
    PASSES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = table + (STEPS - 1) * 258
    last, left = _descend(row, tl.load(row + 256), tl.load(row + 257))
    if tl.program_id(0) == 0:
        tl.store(bounds + 2, last)
        tl.store(bounds + 3, left)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    unit = tl.load(order + i, inside, other=-1)
    cost = tl.load(costs + i, inside, other=1).to(tl.int64)
    is_floor = tl.load(floor + i, inside, other=0) != 0
    first = tl.load(bounds)
    most = tl.load(bounds + 1)
    keep = (unit > first) | ((unit < first) & (unit > last) & (cost <= most))
    keep = inside & (is_floor | (cost == 0) | keep)
    tl.store(mask + i, keep, inside)
    tl.store(per_block + tl.program_id(0), tl.sum(keep.to(tl.int64), 0))
    kept_cost = tl.sum(tl.where(keep, cost, 0), 0)
    tl.store(per_block + tl.num_programs(0) + tl.program_id(0), kept_cost)
    open_units = inside & (keep == 0) & (unit < last) & (cost <= left)
    tl.atomic_add(table + STEPS * 258 + 1, tl.sum(open_units.to(tl.int64), 0), sem="relaxed")


@triton.jit
def _fill(
    order, costs, floor, budget, table, bounds, count, mask, per_block,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    more = tl.load(table + STEPS * 258 + 1) > 0
    last = tl.load(bounds + 2)
    left = tl.load(bounds + 3)
    while more:
        best = tl.full([], -1, tl.int64)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < count
            unit = tl.load(order + i, inside, other=-1)
            cost = tl.load(costs + i, inside, other=0).to(tl.int64)
            is_floor = tl.load(floor + i, inside, other=0) != 0
            fits = (unit < last) & (cost <= left) & (cost > 0) & (is_floor == 0)
            best = tl.maximum(best, tl.max(tl.where(fits, unit, -1), 0))
        more = best >= 0
        if more:
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                chosen = (i < count) & (tl.load(order + i, i < count, other=-1) == best)
                cost = tl.sum(tl.load(costs + i, chosen, other=0).to(tl.int64), 0)
                hit = tl.sum(chosen.to(tl.int64), 0)
                tl.store(mask + i, chosen, chosen)
                block = start // BLOCK
                tl.atomic_add(per_block + block, hit, sem="relaxed")
                tl.atomic_add(per_block + tl.cdiv(count, BLOCK) + block, cost, sem="relaxed")
                left -= cost
            last = best


@triton.jit
def _write(
    mask, per_block, indices, n_kept, kept_cost, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.num_programs(0)
    before = tl.zeros([], tl.int64)
    kept = tl.zeros([], tl.int64)
    cost = tl.zeros([], tl.int64)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        number = tl.load(per_block + block, block < blocks, other=0)
        kept += tl.sum(number, 0)
        before += tl.sum(tl.where(block < program, number, 0), 0)
        cost += tl.sum(tl.load(per_block + blocks + block, block < blocks, other=0), 0)
    if program == 0:
        tl.store(n_kept, kept)
        tl.store(kept_cost, cost)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    keep = (tl.load(mask + i, inside, other=0) != 0).to(tl.int32)
    rank = before + tl.cumsum(keep, 0) - keep  # kept units before this one
    tl.store(indices + tl.where(keep == 1, rank, kept + i - rank), i.to(tl.int64), inside)
