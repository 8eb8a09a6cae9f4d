"""Gates on live models: no effect when open, no unit when closed, exact gradients for all units."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, ops_run, tiny_model
from transformers import masking_utils

from grasp.budget.budget import Budget
from grasp.budget.projection import Projection
from grasp.compress.fold import fold_mask
from grasp.gates.gating import gated, unpadded
from grasp.gates.scales import fold_scales, scale_count, scaled
from grasp.model.units import UnitSpace, decoder_layers

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
both_ties = pytest.mark.parametrize("tied", [False, True])
families = pytest.mark.parametrize("family", FAMILIES)


def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@families
def test_open_gates_change_nothing_and_leave_nothing(family):
    model = tiny_model(family)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    implementation = model.config._attn_implementation
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    want = logits(model), logits(model, attention_mask=padding)
    with gated(model, UnitSpace.of(model)):
        assert torch.equal(logits(model), want[0])
        assert torch.equal(logits(model, attention_mask=padding), want[1])
    assert torch.equal(logits(model), want[0])
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_blocks_of_8192_tokens(family):
    """Open gates change nothing there; positions and masks are those of a short block."""
    model = tiny_model(family, layers=2, heads=2, kv_heads=1, max_position_embeddings=8192)
    ids = torch.randint(3, 250, (1, 8192), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = logits(model, ids)
        with gated(model, UnitSpace.of(model)) as gates:
            gates.set(torch.ones(UnitSpace.of(model).size))
            assert torch.equal(logits(model, ids, attention_mask=unpadded(ids)), want)
            assert close(
                logits(model, ids[:, :64], attention_mask=unpadded(ids[:, :64])), want[:, :64]
            )


def test_gates_come_off_when_the_body_fails():
    model = tiny_model("llama")
    want = logits(model)
    with pytest.raises(ZeroDivisionError), gated(model, UnitSpace.of(model)) as gates:
        gates.set(torch.zeros(UnitSpace.of(model).size))
        raise ZeroDivisionError
    assert torch.equal(logits(model), want)


def test_only_this_instance_is_patched():
    model, other = tiny_model("llama"), tiny_model("llama")
    want = logits(other)
    with gated(model, UnitSpace.of(model)) as gates:
        gates.set(torch.zeros(UnitSpace.of(model).size))
        assert torch.equal(logits(other), want)
        assert not torch.equal(logits(model), want)


@families
@both_ties
@pytest.mark.parametrize("site", ["output", "kv"])
def test_folded_equals_gated(family, tied, site):
    """A hard mask, gated, is the sliced model."""
    model = tiny_model(family, tied=tied)
    space = UnitSpace.of(model)
    mask = Projection(space, Budget("keep", 0.5, 8)).mask(torch.randn(space.size))
    with gated(model, space, site) as gates:
        gates.set(mask.keep.float())
        masked = logits(model)
    fold_mask(model, mask)
    assert close(logits(model), masked)
    assert UnitSpace.of(model) == mask.pruned_space()
    assert UnitSpace.of(model).total_params == sum(p.numel() for p in model.parameters())


@families
@both_ties
@pytest.mark.parametrize("kind", ["channel", "unit"])
def test_folded_equals_scaled(family, tied, kind):
    model = tiny_model(family, tied=tied)
    space = UnitSpace.of(model)
    fold_mask(model, Projection(space, Budget("keep", 0.5, 8)).mask(torch.randn(space.size)))
    before = logits(model)
    scales = 0.5 + torch.rand(scale_count(model, kind))
    with scaled(model, UnitSpace.of(model), kind) as live:
        live.set(scales)
        wanted = logits(model)
    assert torch.equal(logits(model), before) and not close(wanted, before)
    fold_scales(model, kind, scales)
    assert close(logits(model), wanted)


def test_a_narrow_weight_is_rounded_once():
    """o_proj has three factors: a unit's, its inputs' and its outputs'."""
    narrow, wide = (
        tiny_model("llama", dtype=torch.bfloat16).to(kind)
        for kind in (torch.bfloat16, torch.float32)
    )
    scales = 0.5 + torch.rand(scale_count(narrow, "channel"))
    for model in (narrow, wide):
        fold_scales(model, "channel", scales)
    for once, exact in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(once, exact.bfloat16())


def test_unit_scales_are_gates():
    """The paper's scales: one a unit, where its gate sits."""
    model = tiny_model("qwen2")
    space = UnitSpace.of(model)
    values = 0.5 + torch.rand(space.size)
    with gated(model, space) as gates:
        gates.set(values)
        wanted = logits(model)
    with scaled(model, space, "unit") as live:
        live.set(values)
        assert close(logits(model), wanted)


def close(a, b):
    return (a - b).norm() / b.norm() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_gradient_of_every_gate(family):
    """Against central differences, for kept and dropped units alike.

    The norms of transformers compute in fp32 even in an fp64 model, which bounds the agreement.
    """
    model = tiny_model(family, dtype=torch.float64, layers=2, ffn=16, heads=4, kv_heads=2)
    space = UnitSpace.of(model)
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(space.size, dtype=torch.float64, generator=generator) > 0.5).double()
    for _, ffn, kv in space.segments():
        z[ffn.start] = z[kv.start] = 1  # Gemma 2 norms what comes out: no derivative at 0
    z.requires_grad_()

    def loss(values):
        gates.set(values)
        return F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    with gated(model, space) as gates:
        (grad,) = torch.autograd.grad(loss(z), z)
        with torch.no_grad():
            step = 3e-4 * torch.eye(space.size, dtype=torch.float64)
            numeric = torch.stack([(loss(z + e) - loss(z - e)) / 6e-4 for e in step])
    assert grad.abs().min() > 0
    assert (grad - numeric).abs().max() <= 2e-3 * numeric.abs().max()


def test_the_fused_ffn_is_what_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "grasp.gates.gating.gated_swiglu_ffn",
        lambda x, *_, **__: calls.append(1) or torch.zeros_like(x),
    )
    model = tiny_model("llama")
    with gated(model, UnitSpace.of(model)):
        logits(model)
    assert len(calls) == len(decoder_layers(model))


def test_off_the_cpu_down_projections_lie_by_channel_while_gated():
    """Their kept channels are then copied as rows. No second copy, and as before afterwards."""
    model = tiny_model("llama").to("meta")
    weights = [m.ffn.down.weight for m in decoder_layers(model)]
    with gated(model, UnitSpace.of(model)):
        assert all(w.T.is_contiguous() and w.shape[1] > w.shape[0] for w in weights)
    assert all(w.is_contiguous() for w in weights)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("counted", [False, True])
def test_the_attention_kernel_is_what_a_gpu_runs(family, counted, monkeypatch):
    """Its CPU path gives what PyTorch's attention and a product give, gradients too."""
    model = tiny_model(family)
    space = UnitSpace.of(model)
    mask = Projection(space, Budget("keep", 0.4, 8))(torch.randn(space.size))

    def outcome():
        z = (mask * 1.1).requires_grad_()
        gates.set(z, gates.count(z) if counted else None)
        out = logits(model, attention_mask=unpadded(IDS))
        return out, torch.autograd.grad(out.square().sum(), z)[0]

    with gated(model, space) as gates:
        assert gates.count(mask) == [int(part.sum()) for part in mask.split(gates._sizes)]
        want = outcome()
        calls = []
        monkeypatch.setattr("grasp.gates.gating._takes_kernel", lambda *_: calls.append(1) or True)
        got = outcome()
    assert len(calls) == len(decoder_layers(model))
    assert close(got[0], want[0]) and close(got[1], want[1])
    assert (got[1] != 0).all()


@pytest.mark.parametrize("tracing", [False, True])
@pytest.mark.parametrize(
    ("implementation", "window", "kernel"),
    [("sdpa", None, True), ("sdpa", 25, True), ("sdpa", 24, False), ("eager", None, False)],
)
def test_which_attention_runs(implementation, window, kernel, tracing, monkeypatch):
    """Ours, once a layer, wherever attention is plainly causal: 24 tokens see no window of 25.

    Under transformers 5.17 the mask builder skips no mask while a CUDA graph is captured.
    """
    model = tiny_model("mistral", sliding_window=window)
    model.set_attn_implementation(implementation)
    want = logits(model)
    monkeypatch.setattr("grasp.gates.gating._kernel_is_faster", lambda query: True)
    if tracing:
        monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
        monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_: False)
    with gated(model, UnitSpace.of(model)):
        ran = ops_run(lambda: logits(model, attention_mask=unpadded(IDS)))
        assert close(logits(model, attention_mask=unpadded(IDS)), want)
    assert ran.get("grasp::gated_attention", 0) == kernel * len(decoder_layers(model))


def test_a_mask_of_ones_says_so_without_being_read():
    model = tiny_model("mistral", sliding_window=7)
    want = logits(model)
    with gated(model, UnitSpace.of(model)):
        assert torch.equal(logits(model, attention_mask=unpadded(IDS)), want)
    model.to("meta")
    with gated(model, UnitSpace.of(model)):  # where to read a value raises
        logits(model, IDS.to("meta"), attention_mask=unpadded(IDS.to("meta")))
