"""Ops behave the same inside PyTorch on the CPU path, in the interpreter and on a GPU."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from oracle import INTERPRETED, assert_accurate, gradients
from planted import ERRORS, computes_in_bf16
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grasp_kernels import (
    attention,
    budget_topk,
    channel_scale,
    cross_entropy,
    gated_attention,
    gated_swiglu,
    gated_swiglu_ffn,
    linear_cross_entropy,
    linear_distillation,
    projection,
    reference,
    rms_norm_scale,
    scale,
    swiglu,
)


class Op(NamedTuple):
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    names: list[str]

    def check(self, kernel: Callable[..., Tensor]) -> None:
        z = self.inputs[-1] if self.names[-1] in ("dz", "d_scale") else None
        assert_accurate(kernel, self.plain, self.inputs, self.names, z)


def make(name: str, device: str, batch: int = 2) -> Op:
    def randn(*shape):
        return torch.randn(shape, device=device)

    if name == "attention":
        z = torch.tensor([0.0, 0.7], device=device)
        inputs = [randn(batch, 4, 9, 16), randn(batch, 2, 9, 16), randn(batch, 2, 9, 16), z]
        return Op(gated_attention, reference.gated_attention, inputs, ["dq", "dk", "dv", "dz"])
    if name == "loss":
        weight, targets = randn(24, 8), torch.arange(9, device=device)

        def loss(x):
            return linear_cross_entropy(x, weight, targets)

        def definition(x):
            return reference.linear_cross_entropy(x, weight.to(x.dtype), targets)

        return Op(loss, definition, [randn(9, 8)], ["dx"])
    if name == "distillation":
        weight, teacher, targets = randn(24, 8), randn(9, 8), torch.arange(9, device=device)

        def distillation(x):
            return linear_distillation(x, weight, teacher, targets, 0.25)

        def defined(x):
            same = weight.to(x.dtype), teacher.to(x.dtype)
            return reference.linear_distillation(x, *same, targets, 0.25)

        return Op(distillation, defined, [randn(9, 8)], ["dx"])
    z = (torch.arange(24, device=device) % 3 > 0).float() * 0.8
    if name == "scale":
        inputs = [randn(batch, 5, 24), z]
        return Op(channel_scale, reference.channel_scale, inputs, ["dx", "d_scale"])
    if name == "norm":
        weight = randn(24)

        def norm(x, z):
            return rms_norm_scale(x, weight, z, 1e-5)

        def normed(x, z):
            return reference.rms_norm_scale(x, weight, z, 1e-5)

        return Op(norm, normed, [randn(batch, 5, 24), z], ["dx", "d_scale"])
    if name == "swiglu":
        z = (torch.arange(24, device=device) % 3 > 0).float() * 0.8
        inputs = [randn(batch, 5, 24), randn(batch, 5, 24), z]
        return Op(gated_swiglu, reference.gated_swiglu, inputs, ["d_gate_pre", "d_up", "dz"])
    z = (torch.arange(96, device=device) % 3 == 0).float() * 0.8  # 32 kept, 64 computed
    weights = randn(96, 8), randn(96, 8), randn(8, 96)
    max_kept = 40 if name == "ffn, bound known" else None

    def ffn(x, z):
        return gated_swiglu_ffn(x, *weights, z, max_kept=max_kept)

    def plain(x, z):
        return reference.gated_swiglu_ffn(x, *(w.to(x.dtype) for w in weights), z)

    return Op(ffn, plain, [randn(batch, 5, 8), z], ["dx", "dz"])


GATED = ["swiglu", "ffn", "ffn, bound known", "attention"]
SCALED = ["scale", "norm"]
OPS = pytest.mark.parametrize("name", [*GATED, *SCALED, "loss", "distillation"])


@OPS
def test_matches_the_definition(name, device):
    op = make(name, device)
    op.check(op.run)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", [*GATED, *SCALED])
def test_a_planted_error_is_found(name, error, device):
    op = make(name, device)
    with pytest.raises(AssertionError, match="what rounding allows"):
        op.check(error(op.plain))


def test_a_planted_error_is_found_in_the_loss(device):
    op = make("loss", device)
    with pytest.raises(AssertionError, match="what rounding allows"):
        op.check(computes_in_bf16(op.plain))


@OPS
def test_non_contiguous(name, device):
    def spread(x):  # its gradient is strided too
        return torch.stack([x, x.detach()], -1)[..., 0]

    op = make(name, device)
    op.check(lambda *inputs: spread(op.run(*map(spread, inputs))))


def test_non_contiguous_attention_with_every_gate_open(device):
    """Nothing is packed then, so q reaches the op as it lies."""
    op = make("attention", device)
    op.inputs[-1] = torch.ones(2, device=device)

    def spread(x):
        return torch.stack([x, x.detach()], -1)[..., 0]

    op.check(lambda q, k, v, z: op.run(spread(q), spread(k), spread(v), z))


@pytest.mark.parametrize("name", ["loss", "distillation"])
def test_losses_have_no_second_derivative(name, device):
    op = make(name, device)
    (x,) = (tensor.requires_grad_() for tensor in op.inputs)
    (dx,) = torch.autograd.grad(op.run(x) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dx.square().sum().backward()


def test_fp64_stays_under_autocast(device):
    x, weight = (torch.randn(4, 8, dtype=torch.float64, device=device) for _ in range(2))
    targets = torch.arange(4, device=device)
    want = linear_cross_entropy(x, weight, targets)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(linear_cross_entropy(x, weight, targets), want)
        with pytest.raises(TypeError, match="one floating dtype"):
            linear_cross_entropy(x.long(), weight.long(), targets)


def test_down_projection_by_channel(device):
    """The same FFN from a w_down that lies in memory as [F, d]; kept channels are rows of it."""
    x, z = torch.randn(5, 8, device=device), (torch.arange(96, device=device) % 3 == 0).float()
    up, down = torch.randn(96, 8, device=device), torch.randn(8, 96, device=device)

    by_channel = down.t().contiguous().t()

    def ours(x, z):
        return gated_swiglu_ffn(x, up, up, by_channel, z)

    def plain(x, z):
        return reference.gated_swiglu_ffn(x, *(w.to(x.dtype) for w in (up, up, down)), z)

    assert_accurate(ours, plain, [x, z], ["dx", "dz"], z)
    kept = swiglu._columns(by_channel, torch.tensor([2, 5], device=device))
    assert torch.equal(kept, down[:, [2, 5]]) and kept.T.is_contiguous()


@pytest.mark.parametrize("name", [*GATED, *SCALED])
def test_empty_batch(name, device):
    op = make(name, device, batch=0)
    out, *grads = gradients(op.run, op.inputs, torch.zeros_like(op.plain(*op.inputs)))
    assert out.shape == op.plain(*op.inputs).shape
    assert [g.shape for g in grads] == [x.shape for x in op.inputs]
    assert not grads[-1].count_nonzero()


@OPS
def test_compiles_to_one_graph(name, device):
    op = make(name, device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    op.check(torch.compile(op.run, fullgraph=True, backend=backend))


@OPS
def test_checkpointing(name, device):
    op = make(name, device)
    op.check(lambda *inputs: checkpoint(op.run, *inputs, use_reentrant=False))


@pytest.mark.parametrize("name", GATED)
def test_autocast(name, device):
    op = make(name, device)
    half = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(device, half):
        out = op.run(*op.inputs)
        assert out.dtype == half
        grads = gradients(op.run, op.inputs, torch.randn_like(out))[1:]
    assert [g.dtype for g in grads] == [x.dtype for x in op.inputs]


@pytest.mark.parametrize("name", SCALED)
def test_autocast_leaves_the_residual_stream_as_it_is(name, device):
    op = make(name, device)
    with torch.autocast(device, torch.float16 if INTERPRETED else torch.bfloat16):
        out = op.run(*op.inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out, op.run(*op.inputs))


@OPS
def test_no_grad_and_frozen_inputs(name, device):
    op = make(name, device)
    with torch.no_grad():
        expected = op.run(*op.inputs)
    z = op.inputs[-1].clone().requires_grad_()
    out = op.run(*op.inputs[:-1], z)
    assert torch.equal(out, expected)
    (dz,) = torch.autograd.grad(out.sum(), z)
    assert torch.equal(dz, gradients(op.run, op.inputs, torch.ones_like(out))[-1])


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
    weight = torch.randn(24, device=device)
    check(scale._scale, (leaf(5, 24), z))
    check(scale._norm, (leaf(5, 24), weight, z, 1e-5))
    q, k, v, gate = leaf(2, 4, 9, 16), leaf(2, 2, 9, 16), leaf(2, 2, 9, 16), leaf(2)
    backend = "triton" if INTERPRETED or device == "cuda" else "sdpa"
    for key_mask in (None, torch.rand(2, 9, device=device) < 0.7):
        check(attention._attention, (q, k, v, gate, True, 0.3, key_mask, None, backend))
    with torch.no_grad():
        grad = torch.randn(5, 24, device=device)
        check(swiglu._swiglu_backward, (grad, leaf(5, 24), leaf(5, 24), z))
        check(scale._scale_backward, (grad, leaf(5, 24), z))
        _, inverse = scale._norm(grad, weight, z, 1e-5)
        check(scale._norm_backward, (grad, leaf(5, 24), inverse, weight, z))
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
            cross_entropy._cross_entropy,
            (leaf(5, 8).requires_grad_(gradient), weights[0], targets, 2, gradient),
        )
        x = leaf(5, 8).requires_grad_(gradient)
        taught = torch.randn(5, 8, device=device)
        check(cross_entropy._distillation, (x, weights[0], taught, targets, 0.5, 2, gradient))
    scores, costs = torch.randn(30, device=device), torch.randint(1, 9, (30,), device=device)
    budget, floor = (
        torch.tensor(60, device=device),
        torch.zeros(30, dtype=torch.bool, device=device),
    )
    rank = torch.randperm(30).to(device)
    check(projection._topk, (scores, costs, budget, floor, rank))


def test_projection_compiles_and_takes_an_empty_problem(device):
    scores, costs = torch.randn(50, device=device), torch.randint(1, 9, (50,), device=device)
    compiled = torch.compile(budget_topk, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(scores, costs, 77), budget_topk(scores, costs, 77), strict=True):
        assert torch.equal(a, b)
    empty = budget_topk(scores[:0], costs[:0], 5)
    assert empty.mask.shape == empty.indices.shape == (0,)
    assert empty.n_kept == 0 and empty.cost == 0
