"""A scale joins the norm before it only where that gives the same function."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, stock_model, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from grasp.budget.budget import Budget
from grasp.config import PruneConfig
from grasp.gates.memory import memory_mode
from grasp.gates.norms import norms_before
from grasp.gates.objective import next_token_loss
from grasp.gates.scales import _OnInput, ends, fold_scales, scale_count, scaled
from grasp.model.units import UnitSpace, decoder_layers

IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(5))


class Ops(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "grasp":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def joined(model):
    """The norms that scales of channels become a part of, by their names in the decoder."""
    places = [end.linears for end in ends(model, "channel") if end.side == "in"]
    names = {module: name for name, module in model.get_decoder().named_modules()}
    return [names[norm.module] for norm in norms_before(model, places).values()]


def outcome(model, values, watched_by=None):
    z = values.clone().requires_grad_()
    with scaled(model, UnitSpace.of(model), "channel") as scales, watched_by or nullcontext():
        scales.set(z)
        loss = next_token_loss(model, IDS)
        return loss.detach(), torch.autograd.grad(loss, z)[0]


def by_hooks(model, values):
    """The same in plain PyTorch."""
    z = values.clone().requires_grad_()
    space, places = UnitSpace.of(model), ends(model, "channel")
    units, *scales = z.split([space.size, *(end.channels for end in places)])
    handles = []

    def multiply_input(by):
        return lambda _, args: args[0] * by

    for end, scale in zip(places, scales, strict=True):
        for linear in end.linears:
            if end.side == "in":
                handles.append(linear.register_forward_pre_hook(multiply_input(scale)))
            else:
                handles.append(linear.register_forward_hook(lambda _, args, out, s=scale: out * s))
    for m, layer, (_, ffn, kv) in zip(
        decoder_layers(model), space.layers, space.segments(), strict=True
    ):
        heads = units[kv].repeat_interleave(layer.group_size * layer.head_dim)
        handles.append(m.ffn.down.register_forward_pre_hook(multiply_input(units[ffn])))
        handles.append(m.attention.out.register_forward_pre_hook(multiply_input(heads)))
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    for handle in handles:
        handle.remove()
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def some_scales(model):
    generator = torch.Generator().manual_seed(1)
    return 0.5 + torch.rand(scale_count(model, "channel"), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_plain_products(family):
    model = tiny_model(family)
    values = some_scales(model)
    got, want = outcome(model, values), by_hooks(model, values)
    torch.testing.assert_close(got[0], want[0])
    assert (got[1] - want[1]).norm() <= 1e-4 * want[1].norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_has_a_norm_before_queries_and_before_the_ffn(family, dtype):
    before_ffn = "pre_feedforward" if family in ("gemma2", "gemma3_text") else "post_attention"
    want = [f"layers.{i}.{name}_layernorm" for i in range(3) for name in ("input", before_ffn)]
    assert joined(tiny_model(family, dtype=dtype)) == want


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("mode", ["fast", "low"])
def test_each_distinct_tensor_is_multiplied_once(family, mode):
    model = tiny_model(family, layers=2)
    want = outcome(model, some_scales(model))
    config = PruneConfig("m", Budget("keep", 0.5), memory=mode, device="cpu")
    ops = Ops()
    with memory_mode(model, config):
        got = outcome(model, some_scales(model), ops)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    passes = 2 if mode == "low" else 1
    outputs = 4 if family == "phi3" else 6  # o_proj's input; of q, k, v (or qkv), o and down
    assert ops.calls["rms_norm_scale"] == 2 * 2 * passes
    assert ops.calls["rms_norm_scale_backward"] == 2 * 2
    assert ops.calls["channel_scale_backward"] == 2 * outputs


def strange_norm(model, layer):
    """A norm of another function: it takes the mean off."""
    norm = layer.input_layernorm
    before = norm.forward
    norm.forward = lambda x: before(x - x.mean(-1, keepdim=True))


def another_reader(model, layer):
    """Something beside the linear layers reads the norm's output."""
    layer.input_layernorm.register_forward_hook(
        lambda module, args, out: setattr(layer, "seen", out)
    )
    layer.self_attn.register_forward_hook(
        lambda module, args, out: (out[0] + 0.1 * layer.seen, *out[1:])
    )


def a_weight_that_learns(model, layer):
    layer.input_layernorm.weight.requires_grad_()


@pytest.mark.parametrize("change", [strange_norm, another_reader, a_weight_that_learns])
def test_where_it_would_be_another_function_the_scale_stays_by_itself(change):
    model = tiny_model("llama")
    change(model, model.model.layers[1])
    assert "layers.1.input_layernorm" not in joined(model) and len(joined(model)) == 5
    values = some_scales(model)
    got, want = outcome(model, values), by_hooks(model, values)
    torch.testing.assert_close(got[0], want[0])
    assert (got[1] - want[1]).norm() <= 1e-4 * want[1].norm()
    outcome(model, values, ops := Ops())
    # q, k and v share the one product of their input
    assert ops.calls["rms_norm_scale"] == 5 and ops.calls["channel_scale"] == 3 * 6 + 1


@pytest.mark.parametrize(("family", "norms"), [("Granite", 2), ("Olmo", 0), ("Cohere", 0)])
def test_families_by_structure(family, norms):
    """RMSNorm; a LayerNorm; a LayerNorm that attention and FFN share."""
    model = stock_model(family)
    assert len(joined(model)) == norms
    values = some_scales(model)
    with scaled(model, UnitSpace.of(model), "channel") as scales:
        scales.set(values)
        wanted = model(input_ids=IDS, use_cache=False).logits
    fold_scales(model, "channel", values)
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, wanted)


def test_nothing_is_left_behind():
    model = tiny_model("qwen3")
    before = [
        (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    outcome(model, some_scales(model))
    after = [
        (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    assert before == after


def test_a_shared_product_lives_until_its_last_reader_has_it():
    hook, x = _OnInput(lambda: torch.full((4,), 2.0), readers=3), torch.ones(1, 4)
    products = [hook(None, (x,)) for _ in range(3)]
    assert torch.equal(products[0], 2 * x) and all(p is products[0] for p in products)
    left = weakref.ref(products[0])
    del products
    assert left() is None
    assert hook(None, (x,)) is not hook(None, (x.clone(),))
