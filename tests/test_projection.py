"""The projection against a brute-force greedy that shares no code with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.errors import GraspError
from grasp.model.units import LayerUnits, UnitSpace

layers = st.builds(
    LayerUnits,
    ffn=st.sampled_from([8, 16, 24]),
    kv_groups=st.sampled_from([2, 4]),
    group_size=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([4, 8]),
)
experts = st.fixed_dictionaries(
    {
        "experts": st.sampled_from([2, 3, 5]),
        "expert_width": st.sampled_from([1, 7]),
        "experts_per_token": st.sampled_from([1, 2]),
    }
)


@st.composite
def problems(draw, uniform=False):
    """A space, a budget that is possible in it, and scores: distinct, or heavily tied."""
    count = draw(st.integers(1, 4))
    rows = [draw(layers)] * count if uniform else [draw(layers) for _ in range(count)]
    if draw(st.booleans()):  # a mixture; some layers may have experts only, or none
        own = draw(experts)
        kinds = st.sampled_from([own, {**own, "ffn": 0}, {**own, "kv_groups": 0}, {}])
        rows = [replace(row, **draw(kinds)) for row in rows]
    space = UnitSpace(64, tuple(rows), fixed_params=1000)
    kind = draw(st.sampled_from(["keep", "params", "kv_cache"]))
    multiples = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2]))
    layout = "uniform" if uniform else "per-layer"
    shape = Budget(kind, 1.0, *multiples, layout)
    if not uniform:
        ends, listed = st.integers(0, min(1, count - 1)), st.lists(st.integers(0, count - 1))
        shape = replace(shape, protect_first=draw(ends), protect_last=draw(ends))
        shape = replace(shape, protect=tuple(draw(listed)))
    floor, total = shape.floor(space), shape.cost(space)
    assume(total)  # a KV-cache budget needs KV groups
    limit = draw(st.integers(floor, total))
    if kind == "params":
        asked = float(limit * space.hidden_size + space.total_params - space.prunable_params)
    else:
        asked = min(1.0, (limit + 0.5) / total)
    budget = replace(shape, asked=asked)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        scores = torch.randperm(space.size, generator=generator).float()
    else:
        scores = torch.randint(0, 3, (space.size,), generator=generator).float()
    return space, budget, scores


def greedy(
    space: UnitSpace, budget: Budget, scores: list[float], rank: list[int], limit: int
) -> list[bool]:
    """Sequential greedy over blocks, floors first.

    Equal units of a layer follow their rank; equal blocks that of one unit in each, in order.
    """
    # (multiple, cost of a unit, units best first, least) of each kind in each layer
    kinds: list[list[tuple[int, int, list[int], int]]] = [[], [], []]
    start = 0

    def add(kind: int, width: int, multiple: int, cost: int, least: int) -> None:
        nonlocal start
        units = sorted(range(start, start + width), key=lambda u: (-scores[u], rank[u]))
        if units:
            kinds[kind].append((multiple, cost, units, least))
        start += width

    count = len(space.layers)
    whole = [
        index < budget.protect_first
        or index >= count - budget.protect_last
        or index in budget.protect
        for index in range(count)
    ]
    for layer, stays in zip(space.layers, whole, strict=True):
        ffn, kv, _ = budget.unit_costs(layer)
        add(0, layer.ffn, budget.ffn_multiple, ffn, layer.ffn if stays else budget.ffn_multiple)
        add(
            1,
            layer.kv_groups,
            budget.kv_multiple,
            kv,
            layer.kv_groups if stays else budget.kv_multiple,
        )
    for layer, stays in zip(space.layers, whole, strict=True):
        routed = layer.experts if stays else layer.experts_per_token
        add(2, layer.experts, 1, budget.unit_costs(layer)[2], routed)
    each = [[pool] for kind in kinds for pool in kind]
    groups = list(filter(None, kinds)) if budget.layout == "uniform" else each
    blocks = []
    for group in groups:
        multiple, _, units, least = group[0]
        starts = range(0, len(units), multiple)
        ties = sorted(
            min(rank[min(pool[2]) + first + multiple // 2] for pool in group) for first in starts
        )
        for tie, first in zip(ties, starts, strict=True):
            members = [u for pool in group for u in pool[2][first : first + multiple]]
            score = sum(scores[pool[2][first + multiple // 2]] for pool in group) / len(group)
            cost = sum(pool[1] * multiple for pool in group)
            blocks.append((first >= least, -score, tie, cost, members))
    keep = [False] * space.size
    for _, _, _, cost, members in sorted(blocks, key=lambda b: b[:3]):
        if cost <= limit:
            limit -= cost
            for unit in members:
                keep[unit] = True
    return keep


@settings(max_examples=150)
@given(problems(), st.integers(0, 2**31))
def test_equals_greedy(problem, seed):
    space, budget, scores = problem
    rank = torch.randperm(space.size, generator=torch.Generator().manual_seed(seed))
    mask = Projection(space, budget, tie_rank=rank)(scores)
    limit = budget.limit(space)
    assert mask.tolist() == greedy(space, budget, scores.tolist(), rank.tolist(), limit)


@settings(max_examples=150)
@given(problems() | problems(uniform=True), st.integers(0, 5))
def test_budget_floors_and_widths(problem, seed):
    space, budget, scores = problem
    mask = Projection(space, budget, seed=seed).mask(scores)
    pruned = mask.pruned_space()
    spent, limit = budget.cost(pruned), budget.limit(space)
    assert spent <= limit
    for layer, whole in zip(pruned.layers, space.layers, strict=True):
        assert layer.ffn >= min(budget.ffn_multiple, whole.ffn)
        assert layer.kv_groups >= min(budget.kv_multiple, whole.kv_groups)
        assert layer.experts >= layer.experts_per_token or not whole.experts
        assert layer.ffn % budget.ffn_multiple == layer.kv_groups % budget.kv_multiple == 0
    for index in budget.protected(len(space.layers)):
        assert pruned.layers[index] == space.layers[index]
    if budget.layout == "uniform":
        for widths in zip(*((n.ffn, n.kv_groups, n.experts) for n in pruned.layers), strict=True):
            assert len({*widths} - {0}) <= 1
    assert limit - spent < budget.step(space)
    if budget.kind == "params":
        assert pruned.total_params <= budget.asked


@settings(max_examples=60)
@given(problems(uniform=True), st.integers(0, 2**31))
def test_uniform_equals_greedy(problem, seed):
    space, budget, _ = problem
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(seed))
    rank = torch.arange(space.size)
    mask = Projection(space, budget, tie_rank=rank)(scores)
    limit = budget.limit(space)
    assert mask.tolist() == greedy(space, budget, scores.tolist(), rank.tolist(), limit)


def space_of(layers: int = 12, ffn: int = 64, kv: int = 4) -> UnitSpace:
    return UnitSpace(64, (LayerUnits(ffn, kv, 3, 16),) * layers, 0)


def test_equal_scores_spread_over_depth_and_depend_on_the_seed_only():
    space, budget = space_of(), Budget("keep", 0.5, ffn_multiple=1)
    scores = torch.zeros(space.size)
    masks = [Projection(space, budget, seed=seed)(scores) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    shares = [masks[0][ffn].float().mean() for _, ffn, _ in space.segments()]
    assert min(shares) > 0.2  # by position the last layers would keep one channel


def test_a_units_score_counts_whatever_its_sign_or_size():
    space, budget = space_of(2, 8, 2), Budget("keep", 0.5, ffn_multiple=1)
    project = Projection(space, budget)
    scores = torch.randn(space.size)
    assert torch.equal(project(scores), project(scores * 1e-20))
    scores[3] = torch.nan
    assert not project(scores)[3]


def test_limit_can_be_a_tensor():
    space, budget = space_of(), Budget("keep", 0.5)
    project, scores = Projection(space, budget), torch.randn(space_of().size)
    full = project(scores, torch.tensor(space.cost))
    assert full.all()
    assert torch.equal(project(scores, torch.tensor(project.limit)), project(scores))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget("keep", 0.01), "`keep` must be at least 0.3182"),
        (Budget("kv_cache", 0.1), "`kv_cache` must be at least"),
        (Budget("params", 10.0), "`params` must be between .*, got 10"),
        (Budget("params", 1e12), "`params` must be between"),
        (Budget("keep", 0.5, ffn_multiple=48), "`ffn_multiple` must divide"),
        (Budget("keep", 0.5, kv_multiple=3), "`kv_multiple` must divide"),
        (
            Budget("keep", 0.5, protect_first=4, protect_last=2, protect=(4, 5)),
            r"`keep` must be at least 0.7728, which 8 protected layers and one block of every kind "
            "in the others require, got 0.5: keep more, or protect fewer layers",
        ),
        (Budget("kv_cache", 0.5, protect_last=7), "which 7 protected layers and one block"),
        (Budget("params", 40_000.0, protect=(0,)), "for this model with 1 protected layers, got"),
        (Budget("keep", 0.5, protect_last=13), "`protect_last` must be at most 12, the layers"),
        (Budget("keep", 0.5, protect=(3, 12)), "`protect` must list layers between 0 and 11 .* 12"),
        (
            Budget("keep", 0.5, layout="uniform", protect_first=1),
            "`layout='uniform'` gives all layers the same widths, so none can be protected: use",
        ),
    ],
)
def test_impossible_budgets_name_the_fix(budget, words):
    with pytest.raises(GraspError, match=words):
        budget.limit(space_of())


@pytest.mark.parametrize("kind", ["keep", "kv_cache"])
@pytest.mark.parametrize("asked", [0.0, 1.5, -1.0])
def test_a_ratio_is_refused_before_there_is_a_model(kind, asked):
    with pytest.raises(GraspError, match=f"`{kind}` must be above 0 and at most 1, got {asked}"):
        Budget(kind, asked)


def test_uniform_needs_equal_layers():
    space = UnitSpace(64, (LayerUnits(8, 2, 1, 4), LayerUnits(16, 2, 1, 4)), 0)
    with pytest.raises(GraspError, match="`layout='per-layer'`"):
        Budget("keep", 0.5, 1, layout="uniform").limit(space)


def test_one_budget_at_a_time():
    with pytest.raises(GraspError, match="`keep` and `kv_cache` are two budgets"):
        Budget.of(keep=0.5, kv_cache=0.5)
    assert Budget.of() == Budget("keep", 0.5)


def test_a_ratio_is_the_decimal_that_was_written():
    space = UnitSpace(1, (LayerUnits(10, 1, 1, 1),) * 3, 0)  # 102 in all; 0.7 * 102 = 71.4
    assert Budget("keep", 0.7, 1).limit(UnitSpace(1, space.layers[:1] * 10, 0)) == 238
