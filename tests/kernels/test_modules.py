"""The modules compute what their ops do, and one call gates a model of transformers."""

import copy

import pytest
import torch
from families import tiny_model

import grasp_kernels
from grasp_kernels import ChannelScale, GatedAttention, GatedSwiGLUFFN, reference

IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(3))


def close(a, b):
    return (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_with_open_gates_is_the_model(family):
    model = tiny_model(family)
    expected, before = model(IDS).logits, dict(model.state_dict())
    gated = grasp_kernels.apply(model)
    assert len(gated) == model.config.num_hidden_layers
    assert close(model(IDS).logits, expected)
    assert model.state_dict().keys() - before.keys() == {f"{name}.gate" for name in gated}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_gates_learn_and_nothing_else_does():
    model = tiny_model("llama")
    gated = grasp_kernels.apply(model)
    first = next(iter(gated.values()))
    with torch.no_grad():
        first.gate[::2] = 0
    model(IDS, labels=IDS).loss.backward()
    learns = [name for name, p in model.named_parameters() if p.grad is not None]
    assert learns == [f"{name}.gate" for name in gated]
    assert first.gate.grad[::2].abs().min() > 0  # a closed gate can learn its way back


def test_a_closed_channel_is_a_channel_that_is_not_there():
    model = tiny_model("llama")
    cut = copy.deepcopy(model)
    (name, ffn), *_ = grasp_kernels.apply(model).items()
    with torch.no_grad():
        ffn.gate[5] = 0
        cut.get_submodule(name).down_proj.weight[:, 5] = 0
    assert close(model(IDS).logits, cut(IDS).logits)


def test_the_other_modules():
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    attention, scale = GatedAttention(2), ChannelScale(16)
    with torch.no_grad():
        attention.gate[1] = 0.3
        scale.scale[:] = torch.rand(16)
    expected = reference.gated_attention(q, k, v, attention.gate)
    assert close(attention(q, k, v), expected)
    assert close(scale(q), q * scale.scale)


def test_an_ffn_of_two_names_is_gated_under_both():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    gated = grasp_kernels.apply(model)
    assert gated["model.layers.0.mlp"] is gated["model.layers.1.mlp"]
    assert model.model.layers[1].mlp is gated["model.layers.1.mlp"] and len(gated) == 3


@pytest.mark.parametrize("more", [lambda y: 0.5 * y, lambda y: y.clamp(-50, 50)])
def test_an_ffn_that_computes_more_is_refused(more):
    model = tiny_model("llama")
    ffn = model.model.layers[1].mlp
    plain, before = ffn.forward, [name for name, p in model.named_parameters() if p.requires_grad]
    ffn.forward = lambda x: more(plain(x))
    with pytest.raises(ValueError, match=r"layers.1.mlp \(LlamaMLP\) computes more than a SwiGLU"):
        grasp_kernels.apply(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    assert not any(isinstance(m, GatedSwiGLUFFN) for m in model.modules())


def test_what_is_no_swiglu():
    with pytest.raises(ValueError, match="LlamaMLP is an FFN itself: use GatedSwiGLUFFN"):
        grasp_kernels.apply(tiny_model("llama").model.layers[0].mlp)
    for family in ("gemma", "phi3"):  # GeGLU; a fused projection
        with pytest.raises(ValueError, match="has no FFN of gate_proj, up_proj, down_proj, SiLU"):
            grasp_kernels.apply(tiny_model(family))
    linear = torch.nn.Linear(4, 8)
    with pytest.raises(ValueError, match="gate_proj has a bias"):
        GatedSwiGLUFFN(linear, linear, linear)
