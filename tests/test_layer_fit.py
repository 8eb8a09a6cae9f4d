"""Fits to the dense hidden states against the normal equations, and their parts."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from families import FAMILIES, tiny_model
from test_refit import half

from grasp.budget.projection import Mask
from grasp.compress import layer_fit
from grasp.compress import reconstruct as reconstruct_module
from grasp.compress.layer_fit import RIDGES, LayerFit, Sums, adds_up, best_ridge
from grasp.errors import GraspError
from grasp.journal import Journal
from grasp.model.layerwise import first_hidden, layer_options, runner
from grasp.model.load import cast
from grasp.model.units import UnitSpace, decoder_layers


def random_blocks(samples, length, seed=3):
    return torch.randint(3, 250, (samples, length), generator=torch.Generator().manual_seed(seed))


BLOCKS = random_blocks(16, 64)


def fit_only(model, mask, monkeypatch):
    """Fit all layers, without rounds of learning."""
    with monkeypatch.context() as patch:
        patch.setattr(reconstruct_module, "block_rounds", lambda tokens: 0)
        reconstruct_module.reconstruct(model, mask, BLOCKS, 0, Journal())


def passing(model, layer):
    """The input of a layer, and of o_proj and down_proj their inputs and outputs, [tokens, ...]."""
    modules, seen = decoder_layers(model)[layer], []
    hooks = [
        linear.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        for linear in (modules.attention.out, modules.ffn.down)
    ]
    decoder = model.model.layers[layer]
    hooks.append(decoder.register_forward_pre_hook(lambda _, args: seen.append(args[:1])))
    with torch.no_grad():
        model(input_ids=BLOCKS)
    for hook in hooks:
        hook.remove()
    return [[x.double().flatten(0, -2) for x in found] for found in seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_fit_leads_to_the_dense_hidden_states(family, monkeypatch):
    """Without a ridge the normal equations hold: the error is orthogonal to what is kept."""
    monkeypatch.setattr(layer_fit, "best_ridge", lambda fitted, held: 1e-9)
    # what a fit starts from, and is weighted by, cannot be seen behind it
    monkeypatch.setattr(layer_fit, "_power", lambda target, found: target.square().sum(1))
    dense = tiny_model(family)
    model = copy.deepcopy(dense)
    mask = half(model)
    fit_only(model, mask, monkeypatch)
    normed = family in ("gemma2", "gemma3_text")  # a norm between these and the hidden states
    for layer, (ffn, _) in enumerate(mask.layers()):
        ((start,), *want), ((own,), *found) = passing(dense, layer), passing(model, layer)
        targets, reached = ([out for _, out in parts] for parts in (want, found))
        if not normed:
            targets, reached = (
                [*accumulate(targets, initial=start)],
                [*accumulate(reached, initial=own)],
            )
        modules = decoder_layers(model)[layer]
        for linear, (x, _), target, state in zip(
            (modules.attention.out, modules.ffn.down),
            found,
            targets[-2:],
            reached[-2:],
            strict=True,
        ):
            weight = 1 / target.square().sum(1, keepdim=True)
            x = x[:, linear.weight.any(0)]
            error = (target - state) * weight.sqrt()
            x = x * weight.sqrt()
            correlation = x.T @ error / x.norm(dim=0)[:, None] / error.norm()
            assert correlation.abs().max() < 1e-3
        whole = decoder_layers(dense)[layer].ffn
        assert torch.equal(modules.ffn.gate.weight, whole.gate.weight[ffn])


def test_keeping_everything_changes_nothing(monkeypatch):
    dense = tiny_model("qwen2")
    model = copy.deepcopy(dense)
    space = UnitSpace.of(model)
    fit_only(model, Mask(space, torch.ones(space.size, dtype=torch.bool)), monkeypatch)
    for name, weight in dense.state_dict().items():  # on some processors a fit gains by rounding
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-7)


def test_activations_that_are_not_finite_are_an_error(monkeypatch):
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 1e30  # their product overflows
    with pytest.raises(GraspError, match="not finite: use `dtype='fp32'`"):
        fit_only(model, half(model), monkeypatch)


def sums_of(x, target):
    return Sums(x.T @ x, x.T @ target)


def test_a_fit_is_kept_only_if_it_helps_on_held_out_tokens():
    g = torch.Generator().manual_seed(0)
    x, held_x = (torch.randn(200, 40, generator=g) for _ in range(2))
    weight = torch.randn(40, 8, generator=g)

    def ridge(noise):
        missing, held = (noise * torch.randn(200, 8, generator=g) for _ in range(2))
        return best_ridge(sums_of(x, x @ weight + missing), sums_of(held_x, held_x @ weight + held))

    assert ridge(0.1) == RIDGES[0]
    assert ridge(12.0) in RIDGES[1:]
    lost = torch.randn(200, 8, generator=g)
    assert best_ridge(sums_of(x, lost), sums_of(x, -lost)) is None


@pytest.fixture
def one_layer():
    """Hidden states before a layer, and how a fit changes down_proj's first `kept` columns."""
    model, blocks = tiny_model("llama", layers=1), random_blocks(24, 32)
    run = runner(model.model.layers[0], layer_options(model, blocks[:1])[0])
    ends = decoder_layers(model)[0].outputs
    down = ends[0]  # FFN first
    weight = down.weight.clone()

    @torch.no_grad()
    def change(pruned, dense, kept):
        down.weight.copy_(weight)
        fit = LayerFit.of(run, ends, True, pruned, dense.clone(), range(20), range(20, 24))
        fit.keep(down, torch.arange(kept))
        return (down.weight - weight)[:, :kept]

    return first_hidden(model, blocks), change


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("qwen3", True), ("gemma2", False)])
def test_a_large_hidden_state_in_bf16_does_not_hide_that_a_layer_adds_up(family, plain):
    """Rounded to bf16, the state is off by more than a hundredth of what the layer adds to it."""
    model, blocks = tiny_model(family, layers=2), random_blocks(1, 32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)
    cast(model, torch.bfloat16)
    x, options = first_hidden(model, blocks), layer_options(model, blocks)
    for layer, modules, own in zip(model.model.layers, decoder_layers(model), options, strict=True):
        assert adds_up(layer, own, modules.outputs, x) == plain
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_a_massive_first_position_does_not_rule_the_fit(one_layer):
    """All hidden states are off by a tenth of their size, which is a hundredfold at the first."""
    (hidden, change), g = one_layer, torch.Generator().manual_seed(0)
    off = hidden.norm(dim=-1, keepdim=True) * torch.randn(hidden.shape[-1], generator=g) / 100
    sizes = [torch.ones(32, 1).index_fill(0, torch.tensor([0]), factor) for factor in (1, 100)]
    plain, massive = (change((hidden + off) * size, hidden * size, 96) for size in sizes)
    assert (massive - plain).norm() < 0.3 * plain.norm() != 0


def test_a_token_taken_for_a_massive_activation_does_not_rule_the_fit(one_layer):
    """One token's pruned hidden state is a hundred times its target, and cannot be mended."""
    hidden, change = one_layer
    pruned = hidden.clone()
    pruned[3, 5] = 100 * hidden[3, 5].roll(1)
    plain, massive = change(hidden.clone(), hidden, 48), change(pruned, hidden, 48)
    assert (massive - plain).norm() < 0.3 * plain.norm() != 0
