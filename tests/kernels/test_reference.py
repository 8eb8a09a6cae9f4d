"""The CPU path against autograd through the definitions, and against fp64 gradcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import INTERPRETED, MASKS, assert_accurate, greedy, mask
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_kernels import (
    budget_topk,
    channel_scale,
    cross_entropy,
    gated_attention,
    gated_swiglu,
    gated_swiglu_ffn,
    linear_cross_entropy,
    linear_distillation,
    reference,
    rms_norm_scale,
    swiglu,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the CPU path is off in the interpreter")


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", MASKS)
def test_swiglu_gradients(kind):
    z = mask(kind, 7).double().requires_grad_()
    assert gradcheck(gated_swiglu, (wide(2, 3, 7), wide(2, 3, 7), z))
    assert gradcheck(reference.gated_swiglu, (wide(2, 3, 7), wide(2, 3, 7), z))


@pytest.mark.parametrize("max_kept", [None, 96])
@pytest.mark.parametrize("kind", MASKS)
def test_ffn_gradients(kind, max_kept):
    z = mask(kind, 96).double().requires_grad_()
    x, *weights = wide(2, 3, 5), wide(96, 5), wide(96, 5), wide(5, 96)
    frozen = [w.detach() for w in weights]

    def ffn(x, z):
        return gated_swiglu_ffn(x, *frozen, z, max_kept=max_kept)

    assert gradcheck(ffn, (x, z))
    torch.testing.assert_close(ffn(x, z), reference.gated_swiglu_ffn(x, *frozen, z))


@pytest.mark.parametrize(("kept", "computed"), [(0, 0), (1, 64), (64, 64), (65, 128), (173, 200)])
def test_ffn_computes_aligned_widths(kept, computed):
    """Dropped channels fill a matrix up to 64; all are computed where few are left out."""
    z = torch.zeros(200)
    z[torch.randperm(200)[:kept]] = 0.7
    weights = torch.randn(200, 8), torch.randn(200, 8), torch.randn(8, 200)
    for max_kept in (None, kept):
        _, gate_pre, up, dropped, _ = swiglu._ffn(torch.randn(5, 8), *weights, z, max_kept)
        assert gate_pre.shape == up.shape == (5, computed) and dropped.shape == (5, 200 - computed)


def test_ffn_saves_only_what_backward_needs():
    tokens, width, size, kept = 64, 192, 8, 64
    z = torch.zeros(width)
    z[torch.randperm(width)[:kept]] = 1
    z.requires_grad_()
    weights = torch.randn(width, size), torch.randn(width, size), torch.randn(size, width)
    x = torch.randn(tokens, size, requires_grad=True)
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gated_swiglu_ffn(x, *weights, z)
    activations = sum(saved.values()) - sum(w.numel() for w in weights) - 2 * width
    assert activations == tokens * (2 * kept + (width - kept))


@pytest.mark.parametrize("kind", MASKS)
def test_scale_gradients(kind):
    x, scale = wide(2, 3, 7), mask(kind, 7).double().requires_grad_()
    weight = wide(7).detach()
    assert gradcheck(channel_scale, (x, scale))
    assert gradcheck(lambda x, scale: rms_norm_scale(x, weight, scale, 1e-2), (x, scale))
    torch.testing.assert_close(channel_scale(x, scale), reference.channel_scale(x, scale))
    torch.testing.assert_close(
        rms_norm_scale(x, weight, scale, 1e-2), reference.rms_norm_scale(x, weight, scale, 1e-2)
    )


def test_norm_of_a_scale_of_one_is_the_norm_of_pytorch():
    x, weight = torch.randn(5, 64), torch.randn(64)

    def ours(x):
        return rms_norm_scale(x, weight, torch.ones(64), 1e-6)

    def plain(x):
        return torch.nn.functional.rms_norm(x, (64,), weight.to(x.dtype), 1e-6)

    assert_accurate(ours, plain, [x], ["dx"], None)


def test_norm_saves_its_input_and_a_number_a_row():
    x, weight, scale = torch.randn(40, 64, requires_grad=True), torch.randn(64), torch.ones(64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.data_ptr(), t.numel())), lambda t: t
    ):
        rms_norm_scale(x, weight, scale.requires_grad_(), 1e-6)
    assert sum(size for at, size in set(saved)) == 40 * 64 + 40 + 2 * 64
    assert (x.data_ptr(), x.numel()) in saved


@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_gradients(kind, causal, key_mask):
    z = mask(kind, 3).double().requires_grad_()
    keep = torch.tensor([[False, True, True, False, True]] * 2) if key_mask else None

    def attention(q, k, v, z):
        return gated_attention(q, k, v, z, causal, key_mask=keep)

    q, k, v = wide(2, 6, 5, 4), wide(2, 3, 5, 4), wide(2, 3, 5, 4)
    assert gradcheck(attention, (q, k, v, z))
    torch.testing.assert_close(
        attention(q, k, v, z), reference.gated_attention(q, k, v, z, causal, None, keep)
    )


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("rows", [1, 5, 6, 100])
def test_cross_entropy(rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK", 64 * rows)
    x, weight, targets = wide(11, 7), wide(64, 7).detach() * 9, torch.randint(64, (11,))
    assert gradcheck(lambda x: 3 * linear_cross_entropy(x, weight, targets), (x,))
    with Largest() as seen:
        loss = linear_cross_entropy(x, weight, targets)
    assert seen.size <= max(64 * min(rows, 11), x.numel())
    torch.testing.assert_close(loss, reference.linear_cross_entropy(x, weight, targets))


@pytest.mark.parametrize("hard", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 6, 100])
def test_distillation(rows, hard, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK", 2 * 64 * rows)
    x, weight, targets = wide(11, 7), wide(64, 7).detach() * 9, torch.randint(64, (11,))
    teacher = wide(11, 7).detach()

    def loss(x):
        return 3 * linear_distillation(x, weight, teacher, targets, hard)

    assert gradcheck(loss, (x,))
    with Largest() as seen:
        value = loss(x)
    assert seen.size <= max(64 * min(rows, 11), x.numel())
    plain = reference.linear_distillation(x, weight, teacher, targets, hard)
    torch.testing.assert_close(value, 3 * plain)
    if hard == 0:
        assert linear_distillation(teacher, weight, teacher, targets) == 0
    if hard == 1:
        torch.testing.assert_close(value, 3 * linear_cross_entropy(x, weight, targets))


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_cross_entropy_in_bf16(scale):
    """Sharp distributions included; without a gradient, the same bits."""
    x, weight = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) * scale / 32).bfloat16()
    targets = torch.randint(500, (64,))

    def ours(x):
        return linear_cross_entropy(x, weight, targets)

    def plain(x):
        return reference.linear_cross_entropy(x, weight.to(x.dtype), targets)

    assert_accurate(ours, plain, [x], ["dx"], None)
    assert torch.equal(ours(x), ours(x.requires_grad_()))


@pytest.mark.parametrize("scores", ["random", "tied", "two values", "rounded"])
def test_projection_of_a_7b_model(scores):
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
    rank = torch.randperm(units)
    budget = int(costs.sum()) // 2 + 77
    chosen = budget_topk(value, costs, budget, floor=floor, tie_rank=rank)
    assert torch.equal(chosen.mask, greedy(value, costs, budget, floor, rank))
    assert chosen.cost == costs[chosen.mask].sum()
    assert budget - chosen.cost < 3


@st.composite
def problems(draw):
    size = draw(st.integers(0, 40))
    special = st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf")])
    scores = draw(st.lists(special | st.floats(width=32), min_size=size, max_size=size))
    costs = draw(st.lists(st.integers(0, 30), min_size=size, max_size=size))
    floor = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    rank = draw(st.permutations(range(size)))
    least = sum(c for c, f in zip(costs, floor, strict=True) if f)
    budget = draw(st.integers(least, sum(costs) + 2))
    return (
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(costs, dtype=torch.int64),
        budget,
        torch.tensor(floor, dtype=torch.bool),
        torch.tensor(rank, dtype=torch.int64),
    )


@settings(max_examples=200)
@given(problems())
def test_projection_is_sequential_greedy(problem):
    scores, costs, budget, floor, rank = problem
    chosen = budget_topk(scores, costs, budget, floor=floor, tie_rank=rank)
    expected = greedy(*problem)
    assert torch.equal(chosen.mask, expected)
    assert chosen.n_kept == expected.sum() and chosen.cost == costs[expected].sum()
    assert torch.equal(chosen.indices, torch.argsort(~expected, stable=True))


def test_projection_takes_a_budget_on_the_device_and_defaults():
    scores, costs = torch.tensor([0.5, 2.0, 1.0, 2.0]), torch.tensor([1, 2, 1, 2])
    assert budget_topk(scores, costs, torch.tensor(4)).mask.tolist() == [False, True, False, True]
    assert budget_topk(scores, costs, 2).mask.tolist() == [False, True, False, False]
    assert budget_topk(scores, costs, 3).indices.tolist() == [1, 2, 0, 3]
