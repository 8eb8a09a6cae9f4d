import pytest
import torch
from oracle import INTERPRETED, greedy

from grasp_kernels import budget_topk
from grasp_kernels._triton import launch


def check(scores, costs, budget, floor, rank, device, select=budget_topk):
    arguments = [x.to(device) for x in (scores, costs)]
    chosen = select(*arguments, budget, floor=floor.to(device), tie_rank=rank.to(device))
    expected = greedy(scores, costs, int(budget), floor, rank)
    assert torch.equal(chosen.mask.cpu(), expected)
    assert torch.equal(chosen.indices.cpu(), torch.argsort(~expected, stable=True))
    assert chosen.n_kept.item() == expected.sum()
    assert chosen.cost.item() == costs[expected].sum()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("number", range(8))
def test_random_problems(number, dtype, device):
    """Few and many distinct costs, ties, NaN, both zeros, floors, and budgets from none to all."""
    size = [1, 2, 3, 17, 40, 61, 100, 128][number]
    scores = torch.randn(size).mul(2).round() / 2 * (-1) ** number
    scores[torch.rand(size) < 0.1] = float("nan")
    scores[torch.rand(size) < 0.1] = -0.0
    costs = torch.randint(0, [4, 20, 600][number % 3], (size,), dtype=dtype)
    if number % 4 == 3:
        costs = torch.where(torch.rand(size) < 0.2, 512, 3).to(dtype)
    floor = torch.rand(size) < 0.1
    least, most = int(costs[floor].sum()), int(costs.sum())
    budget = torch.tensor(least + (most - least) * number // 7, device=device)
    check(scores, costs, budget, floor, torch.randperm(size), device)


@pytest.mark.parametrize("scores", ["random", "tied", "two values", "rounded"])
def test_a_7b_model(scores, device, monkeypatch):
    if INTERPRETED:  # a program costs the interpreter 30 ms, whatever its size
        wide = launch.Config({"BLOCK": 65_536}, num_warps=8)
        monkeypatch.setitem(launch.table(torch.device(device)), "projection", wide)
    units = 353_280
    value = {
        "random": torch.randn(units),
        "tied": torch.zeros(units),
        "two values": (torch.rand(units) < 0.3).float(),
        "rounded": torch.randn(units).mul(4).round(),
    }[scores]
    costs = torch.full((units,), 3)
    costs[-1024:] = 512
    floor = torch.zeros(units, dtype=torch.bool)
    floor[::11_008] = True
    check(value, costs, int(costs.sum()) // 2 + 77, floor, torch.randperm(units), device)


@pytest.fixture
def blocks(monkeypatch, device):
    """A problem of several blocks: scores, costs, budget, floor and rank."""
    small = launch.Config({"BLOCK": 64}, num_warps=4)
    monkeypatch.setitem(launch.table(torch.empty(0, device=device).device), "projection", small)
    size = 300
    costs = torch.randint(1, 9, (size,))
    floor = torch.rand(size) < 0.05
    return torch.randn(size), costs, 500, floor, torch.randperm(size)


def test_many_blocks(blocks, device):
    check(*blocks, device)


def test_a_skipped_block_is_found(blocks, device):
    def skip(scores, *others, **options):
        scores = scores.clone()
        scores[64:128] = float("nan")
        return budget_topk(scores, *others, **options)

    with pytest.raises(AssertionError):
        check(*blocks, device, select=skip)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
def test_no_host_sync_and_graph_capture():
    units = 353_280
    scores = torch.randn(units, device="cuda")
    costs = torch.full((units,), 3, device="cuda")
    floor = torch.zeros(units, dtype=torch.bool, device="cuda")
    rank = torch.randperm(units, device="cuda")
    budget = torch.tensor(units, device="cuda")
    budget_topk(scores, costs, budget, floor=floor, tie_rank=rank)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        budget_topk(scores, costs, budget, floor=floor, tie_rank=rank)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = budget_topk(scores, costs, budget, floor=floor, tie_rank=rank)
    for _ in range(3):
        scores.copy_(torch.randn(units))
        budget.copy_(torch.randint(0, 3 * units, ()))
        graph.replay()
        expected = greedy(scores.cpu(), costs.cpu(), int(budget), floor.cpu(), rank.cpu())
        assert torch.equal(chosen.mask.cpu(), expected)
