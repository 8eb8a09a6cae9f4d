"""How the ops behave inside PyTorch: the same on the CPU path, in the interpreter and on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from oracle import INTERPRETED, gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grasp_kernels import (
    attention,
    budget_topk,
    cross_entropy,
    gated_attention,
    gated_swiglu,
    gated_swiglu_ffn,
    linear_cross_entropy,
    projection,
    reference,
    swiglu,
)


class Op(NamedTuple):
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]


def make(name: str, device: str, batch: int = 2) -> Op:
    def randn(*shape):
        return torch.randn(shape, device=device)

    if name == "attention":
        z = torch.tensor([0.0, 0.7], device=device)
        inputs = [randn(batch, 4, 9, 16), randn(batch, 2, 9, 16), randn(batch, 2, 9, 16), z]
        return Op(gated_attention, reference.gated_attention, inputs)
    if name == "loss":
        weight, targets = randn(24, 8), torch.arange(9, device=device)

        def loss(x):
            return linear_cross_entropy(x, weight, targets)

        def definition(x):
            return reference.linear_cross_entropy(x, weight.to(x.dtype), targets)

        return Op(loss, definition, [randn(9, 8)])
    if name == "swiglu":
        z = (torch.arange(24, device=device) % 3 > 0).float() * 0.8
        inputs = [randn(batch, 5, 24), randn(batch, 5, 24), z]
        return Op(gated_swiglu, reference.gated_swiglu, inputs)
    z = (torch.arange(96, device=device) % 3 == 0).float() * 0.8  # 32 kept, 64 computed
    weights = randn(96, 8), randn(96, 8), randn(8, 96)
    max_kept = 40 if name == "ffn, bound known" else None

    def ffn(x, z):
        return gated_swiglu_ffn(x, *weights, z, max_kept=max_kept)

    def plain(x, z):
        return reference.gated_swiglu_ffn(x, *(w.to(x.dtype) for w in weights), z)

    return Op(ffn, plain, [randn(batch, 5, 8), z])


GATED = ["swiglu", "ffn", "ffn, bound known", "attention"]
OPS = pytest.mark.parametrize("name", [*GATED, "loss"])


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@OPS
def test_matches_the_definition(name, device):
    op = make(name, device)
    grad = torch.randn_like(op.run(*op.inputs))
    expected = gradients(op.plain, op.inputs, grad)
    assert_same(gradients(op.run, op.inputs, grad), expected, rtol=1e-4, atol=1e-5)


@OPS
def test_non_contiguous(name, device):
    op = make(name, device)
    strided = [torch.stack([x, x], -1)[..., 0] for x in op.inputs]
    grad = torch.randn_like(op.run(*op.inputs))
    expected = gradients(op.run, op.inputs, grad)
    assert_same(gradients(op.run, strided, torch.stack([grad, grad], -1)[..., 0]), expected)


def test_down_projection_by_channel(device):
    """The same FFN from a w_down that lies in memory as [F, d]; kept channels are rows of it."""
    x, z = torch.randn(5, 8, device=device), (torch.arange(96, device=device) % 3 == 0).float()
    up, down = torch.randn(96, 8, device=device), torch.randn(8, 96, device=device)

    def run(x, z, down=down):
        return gated_swiglu_ffn(x, up, up, down, z)

    by_channel = down.t().contiguous().t()
    grad = torch.randn_like(x)
    expected = gradients(run, [x, z], grad)
    assert_same(gradients(partial(run, down=by_channel), [x, z], grad), expected)
    kept = swiglu._columns(by_channel, torch.tensor([2, 5], device=device))
    assert torch.equal(kept, down[:, [2, 5]]) and kept.T.is_contiguous()


@pytest.mark.parametrize("name", GATED)
def test_empty_batch(name, device):
    op = make(name, device, batch=0)
    out, *grads = gradients(op.run, op.inputs, torch.zeros_like(op.plain(*op.inputs)))
    assert out.shape == op.plain(*op.inputs).shape
    assert [g.shape for g in grads] == [x.shape for x in op.inputs]
    assert not grads[-1].count_nonzero()


@OPS
def test_compiles_to_one_graph(name, device):
    torch._dynamo.reset()
    op = make(name, device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(op.run, fullgraph=True, backend=backend)
    grad = torch.randn_like(op.run(*op.inputs))
    assert_same(gradients(compiled, op.inputs, grad), gradients(op.run, op.inputs, grad))


@OPS
def test_checkpointing(name, device):
    op = make(name, device)

    def checkpointed(*inputs):
        return checkpoint(op.run, *inputs, use_reentrant=False)

    grad = torch.randn_like(op.run(*op.inputs))
    assert_same(gradients(checkpointed, op.inputs, grad), gradients(op.run, op.inputs, grad))


@pytest.mark.parametrize("name", GATED)
def test_autocast(name, device):
    op = make(name, device)
    half = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(device, half):
        out = op.run(*op.inputs)
        assert out.dtype == half
        grads = gradients(op.run, op.inputs, torch.randn_like(out))[1:]
    assert [g.dtype for g in grads] == [x.dtype for x in op.inputs]


@OPS
def test_no_grad_and_frozen_inputs(name, device):
    op = make(name, device)
    with torch.no_grad():
        expected = op.run(*op.inputs)
    z = op.inputs[-1].clone().requires_grad_()
    out = op.run(*op.inputs[:-1], z)
    torch.testing.assert_close(out, expected)
    (dz,) = torch.autograd.grad(out.sum(), z)
    expected = gradients(op.run, op.inputs, torch.ones_like(out))[-1]
    torch.testing.assert_close(dz, expected)


def test_opcheck(device):
    def leaf(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    check = torch.library.opcheck
    z = (torch.rand(24, device=device) < 0.5).float().requires_grad_()
    check(swiglu._swiglu, (leaf(5, 24), leaf(5, 24), z))
    weights = [w.detach() for w in (leaf(96, 8), leaf(96, 8), leaf(8, 96))]
    channels = (torch.arange(96, device=device) % 3 == 0).float().requires_grad_()
    for max_kept in (None, 40, 80, 96):  # computed: 64, 64, all, all
        check(swiglu._ffn, (leaf(5, 8), *weights, channels, max_kept))
    q, k, v, gate = leaf(2, 4, 9, 16), leaf(2, 2, 9, 16), leaf(2, 2, 9, 16), leaf(2)
    backend = "triton" if INTERPRETED or device == "cuda" else "sdpa"
    for key_mask in (None, torch.rand(2, 9, device=device) < 0.7):
        check(attention._attention, (q, k, v, gate, True, 0.3, key_mask, None, backend))
    with torch.no_grad():
        grad = torch.randn(5, 24, device=device)
        check(swiglu._swiglu_backward, (grad, leaf(5, 24), leaf(5, 24), z))
        x, grad = leaf(5, 8), torch.randn(5, 8, device=device)
        _, *saved = swiglu._ffn(x, *weights, channels, 40)
        check(swiglu._ffn_backward, (grad, *saved, *weights, channels))
        _, *saved = attention._attention(q, k, v, gate, True, 0.3, None, None, backend)
        tensors = (torch.randn_like(q), q, k, v, gate, *saved, None)
        check(attention._attention_backward, (*tensors, True, 0.3, None, backend))
        check(attention._gate_backward, (torch.randn_like(q), torch.randn_like(q), gate))
    targets = torch.arange(5, device=device)
    for gradient in (True, False):
        check(
            cross_entropy._loss,
            (leaf(5, 8).requires_grad_(gradient), weights[0], targets, 2, gradient),
        )
    scores, costs = torch.randn(30, device=device), torch.randint(1, 9, (30,), device=device)
    budget, floor = (
        torch.tensor(60, device=device),
        torch.zeros(30, dtype=torch.bool, device=device),
    )
    rank = torch.randperm(30).to(device)
    check(projection._topk, (scores, costs, budget, floor, rank))


def test_projection_compiles_and_takes_an_empty_problem(device):
    torch._dynamo.reset()
    scores, costs = torch.randn(50, device=device), torch.randint(1, 9, (50,), device=device)
    compiled = torch.compile(budget_topk, fullgraph=True, backend="aot_eager")
    assert_same([*compiled(scores, costs, 77)], [*budget_topk(scores, costs, 77)])
    empty = budget_topk(scores[:0], costs[:0], 5)
    assert empty.mask.shape == empty.indices.shape == (0,)
    assert empty.n_kept == 0 and empty.cost == 0
